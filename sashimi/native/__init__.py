"""Generation by compiled code, on one CPU core: the steps of `model.step`, an order of magnitude faster."""
