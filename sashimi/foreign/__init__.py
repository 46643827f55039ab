"""Models of other code: `importer` reads checkpoints, `translation` maps tensors, `legacy` runs what cannot train."""
