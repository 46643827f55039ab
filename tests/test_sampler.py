"""Ids from uniforms: draws follow the model's distribution, and a clip's bits depend on nothing but its number."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi, SashimiState
from sashimi.sampler import (
    LEAST_TEMPERATURE,
    LEAST_TOP_P,
    Drawing,
    Generator,
    Plain,
    draw,
    generate,
    make_engine,
    uniforms,
)

LEVELS = 32


def tiny(seed: int = 0, pool: tuple[int, ...] = (2, 2), **more: object) -> Sashimi:
    """A model whose predictions depend on what it heard: the head is made louder than at initialization."""
    torch.manual_seed(seed)
    config = ModelConfig(levels=LEVELS, d_model=8, n_layers=1, pool=pool, d_state=8, **more)  # type: ignore[arg-type]
    model = Sashimi(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model


def even(n: int) -> Tensor:
    """Uniforms that leave nothing to chance: n of them, one in the middle of each n-th of [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def shares(logits: Tensor, n: int = 10000, **settings: float) -> Tensor:
    """How often each id is drawn from evenly spread uniforms: (V,) in [0, 1], exact to 1/n."""
    ids, _ = draw(logits.expand(n, -1), even(n), **settings)  # type: ignore[arg-type]
    return torch.bincount(ids, minlength=len(logits)) / n


# --- one sample


def test_uniforms_are_a_function_of_seed_clip_and_sample() -> None:
    """Law 16. Mutations: `counter=start`; `key` without `clip`; another shift than 11."""
    assert uniforms(7, 3, 6).tolist() == [
        0.4821286018761155,
        0.7241355726248441,
        0.05025403948627161,
        0.31612687235830494,
        0.6807485287933278,
        0.1953179050146333,
    ]
    assert uniforms(2**64 - 1, 10**6, 2, start=10**12).tolist() == [0.563945202336186, 0.7892492859743626]
    whole = uniforms(1, 2, 50)
    for start in (0, 1, 2, 3, 4, 7, 41):
        assert np.array_equal(uniforms(1, 2, 9, start), whole[start : start + 9])
    assert not np.isin(whole, np.concatenate((uniforms(1, 3, 50), uniforms(2, 2, 50), uniforms(2, 1, 50)))).any()


def test_draws_follow_the_softmax() -> None:
    """Inverse CDF, by spread and by random uniforms (chi-square). Mutation: `probs.sqrt()` in the cdf."""
    logits = 2 * torch.randn(LEVELS, generator=torch.manual_seed(0))
    expected = logits.double().softmax(-1)
    assert torch.allclose(shares(logits).double(), expected, rtol=0, atol=1.001e-4)

    n = 20000
    u = torch.from_numpy(uniforms(0, 0, n))
    count = torch.bincount(draw(logits.expand(n, -1), u)[0], minlength=LEVELS)
    chi_square = ((count - n * expected) ** 2 / (n * expected)).sum()
    assert chi_square < LEVELS - 1 + 4 * math.sqrt(2 * (LEVELS - 1))


def test_temperature_divides_the_logits() -> None:
    """Mutation: multiply by the temperature."""
    logits = torch.randn(LEVELS, generator=torch.manual_seed(1))
    for temperature in (0.3, 2.0):
        expected = (logits.double() / temperature).softmax(-1)
        assert torch.allclose(shares(logits, temperature=temperature).double(), expected, rtol=0, atol=1.001e-4)


def test_impossible_ids_are_not_drawn() -> None:
    """Not even by the extreme uniforms. Mutation: `right=False`."""
    logits = torch.full((2, 6), -math.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    ids, nats = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ids.tolist() == [2, 4]
    assert nats.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 3}),  # 3 and 4 are equally likely
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 0.99}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # 2/3 and 1/3 of what top_k leaves
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),
    ],
)
def test_truncation_keeps_the_likeliest(settings: dict[str, float], left: set[int]) -> None:
    """And their proportions. Mutations: `before <= …`; sort without `descending`; `top_k + 1`."""
    probs = torch.tensor([1 / 2, 1 / 4, 1 / 16, 3 / 32, 3 / 32], dtype=torch.float64)
    kept = torch.tensor([p if i in left else 0.0 for i, p in enumerate(probs.tolist())])
    assert torch.allclose(shares(probs.log(), **settings), kept / kept.sum(), rtol=0, atol=1.001e-4)


@pytest.mark.parametrize("engine", ["plain", "native", "graph"])
def test_the_least_of_a_setting_leaves_the_likeliest(engine: str) -> None:
    """Denormal numbers being none. Mutation: bounds of 1e-310, which every draw takes for 0."""
    model = tiny()
    likeliest = generate(model, 40, clips=range(2), top_k=1, engine=engine)
    for least in ({"temperature": LEAST_TEMPERATURE}, {"top_p": LEAST_TOP_P}):
        assert torch.equal(generate(model, 40, clips=range(2), engine=engine, **least), likeliest)


def test_nats_are_the_models_own() -> None:
    """Whatever the temperature and truncation. Mutation: gather from `probs.log()`."""
    logits = torch.randn(4, LEVELS, generator=torch.manual_seed(2))
    for settings in ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3, "temperature": 2.0}):
        ids, nats = draw(logits, even(4), **settings)  # type: ignore[arg-type]
        expected = torch.nn.functional.cross_entropy(logits.double(), ids, reduction="none")
        assert torch.allclose(nats, expected, rtol=1e-12, atol=0)


# --- clips


@pytest.mark.parametrize("engine", ["plain", "native", "graph"])
def test_a_clip_is_the_same_whatever_else_is_asked_for(engine: str) -> None:
    """Law 16: to the bit, nats included, in any company and order, and when asked for again.

    Mutations: in `generate`, `batches_of([*range(len(numbers))], …)`; in `Tier.step`'s pooling, no `pending.clone()`;
    in `Graph`, `state.tier` instead of clones.
    """
    model, n, prompt = tiny(), 40, torch.tensor([9, 20, 3])  # the prompt leaves half-filled pooling blocks
    ids = generate(model, n, clips=range(7), batch_size=3, prompt=prompt, engine=engine)
    assert len(ids.unique(dim=0)) == 7
    for clips in ([6], [4, 0, 2], [5, 5, 1], range(6, -1, -1)):
        again = generate(model, n, clips=clips, batch_size=3, prompt=prompt, engine=engine)
        assert torch.equal(again, ids[list(clips)])
    drawing = Drawing(batch_size=3, engine=engine)
    generator = Generator(model, drawing, make_engine(model, drawing), prompt)
    first = generator.batch(1, n)
    generator.batch(0, n)
    assert all(map(torch.equal, generator.batch(1, n), first))
    assert torch.equal(first[0], ids[3:6])


def test_batch_sizes_and_blocks_agree_in_float64() -> None:
    """Law 16 across batch sizes; and a clip longer than an engine's block is the engine's in one piece.

    Mutations: `uniforms(seed, i, …)` instead of `first + i`; leave out `start` there.
    """
    model, n = tiny().double(), 530
    ids = generate(model, n, clips=range(4))
    for size in (1, 3):
        assert torch.equal(generate(model, 50, clips=range(4), batch_size=size), ids[:, :50])
    with torch.inference_mode():
        engine = Plain(model, draw)
        u = torch.from_numpy(np.stack([uniforms(0, clip, n) for clip in range(4)]))
        assert torch.equal(engine(torch.full((4,), LEVELS // 2), model.init_state(4), u)[0], ids)


@pytest.mark.parametrize("variant", [{}, {"unet": True, "norm": "scalar", "weight_norm": True}])
def test_samples_are_scored_as_forward_scores_them(variant: dict[str, object]) -> None:
    """Law 16, teacher-forced: forward on (silence, ids before) gives the nats of every draw within 1e-4.

    Mutation: begin with `torch.tensor([0])` instead of silence.
    """
    model = tiny(**variant)
    drawing = Drawing(temperature=0.8, batch_size=3)
    ids, nats = Generator(model, drawing, make_engine(model, drawing)).batch(0, 60)
    with torch.no_grad():
        logits = model(torch.cat((torch.full((3, 1), LEVELS // 2), ids[:, :-1]), dim=1))
    expected = torch.nn.functional.cross_entropy(logits.double().mT, ids, reduction="none")
    assert (nats - expected).abs().max() < 1e-4


def test_teacher_forced_logits_agree_across_batch_sizes() -> None:
    """Law 16 in float32: stepping through the same ids, alone or among others, gives the same logits within 1e-4.

    Mutation: in `Recurrence.step`, sum the low-rank term over the batch too.
    """
    model = tiny()
    ids = generate(model, 40, clips=range(4))

    def logits(rows: Tensor) -> Tensor:
        state, outputs = model.init_state(len(rows)), []
        for inputs in rows.unbind(1):
            output, state = model.step(inputs, state)
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    with torch.no_grad():
        together, alone = logits(ids), torch.cat([logits(row[None]) for row in ids])
    assert (together - alone).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.parametrize(
    ("pool", "length", "n_samples"),
    [((2, 2), 1, 1100), ((2, 2), 7, 1100), ((2, 2), 600, 1100), ((2, 3, 3), 7, 1100), ((24, 24), 7, 700)],
)
def test_blocks_end_where_pooling_periods_do(pool: tuple[int, ...], length: int, n_samples: int) -> None:
    """After a prompt, an engine's first call alone begins within a period, whatever the pooling.

    Mutations: `range(0, n_samples, whole)`; `whole = _BLOCK`; drop `max(1, ...)`.
    """
    model, calls = tiny(pool=pool), []

    class Listening(Plain):
        def __call__(
            self, inputs: Tensor, state: SashimiState, uniforms: Tensor
        ) -> tuple[Tensor, Tensor, SashimiState]:
            calls.append((state.phase, uniforms.shape[1]))
            return super().__call__(inputs, state, uniforms)

    engine = Listening(model, draw)
    Generator(model, Drawing(batch_size=1), engine, torch.arange(length) % LEVELS).batch(0, n_samples)
    assert len(calls) > 1
    assert [phase for phase, _ in calls] == [length % math.prod(pool), *[0] * (len(calls) - 1)]
    assert sum(samples for _, samples in calls) == n_samples


@pytest.mark.parametrize("length", [1, 2, 5, 8, 11])
def test_a_prompt_is_taken_in_as_if_it_had_been_drawn(length: int) -> None:
    """Prefill equals stepping through silence and the prompt, in float64. Mutation: prefill `rows[:, 1:]`."""
    model = tiny().double()
    prompt = torch.randint(LEVELS, (length,), generator=torch.manual_seed(3))
    state, n = model.init_state(2), 20
    with torch.no_grad():
        for heard in (LEVELS // 2, *prompt.tolist()[:-1]):
            _, state = model.step(torch.full((2,), heard), state)
        u = torch.from_numpy(np.stack([uniforms(0, clip, n) for clip in range(2)]))
        expected, _, _ = Plain(model, draw)(torch.full((2,), int(prompt[-1])), state, u)
    assert torch.equal(generate(model, n, clips=range(2), prompt=prompt), expected)
    assert not torch.equal(generate(model, n, clips=range(2)), expected)


def test_generating_leaves_a_model_in_training_as_it_was() -> None:
    """Dropout is off meanwhile, its mode comes back, and the ids can be trained on.

    Mutations: no `model.eval()`; no `model.train(training)`; stack the rows in inference mode.
    """
    model, prompt = tiny(dropout=0.5), torch.arange(8)
    expected = generate(model, 20, prompt=prompt)
    model.train()
    ids = generate(model, 20, prompt=prompt)
    assert torch.equal(ids, expected)
    assert model.training
    torch.nn.functional.cross_entropy(model(ids).mT, ids).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_thread_without_denormals_computes(dtype: torch.dtype) -> None:
    """While clips are computed torch has one thread and flushes denormals; afterwards all is as it was.

    Mutations: in _inference, drop `torch.set_num_threads(1)`, `torch.set_flush_denormal` in either place, or its
    question's `dtype`.
    """

    def flushes() -> bool:
        return not (torch.tensor(1e-38, dtype=torch.float32) * 0.1).item()

    seen, threads, default = [], torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(2)
    torch.set_default_dtype(dtype)
    try:
        for flushed in (False, True):
            torch.set_flush_denormal(flushed)
            generate(tiny(), 4, on_progress=lambda samples: seen.append((torch.get_num_threads(), flushes())))
            assert (torch.get_num_threads(), flushes()) == (2, flushed)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(default)
        torch.set_flush_denormal(False)
    assert seen
    assert set(seen) == {(1, True)}


def test_progress_counts_samples() -> None:
    """Mutation: report `block.stop`."""
    told: list[int] = []
    generate(tiny(), 600, clips=[1], batch_size=1, on_progress=told.append)
    assert len(told) > 1
    assert sum(told) == 600


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"clips": []}, r"clips=\[\]"),
        ({"clips": [-1]}, "clips="),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": 1e-310}, "temperature=1e-310"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": LEVELS + 1}, f"top_k={LEVELS + 1}.*{LEVELS} levels"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1e-310}, "top_p=1e-310"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompt": torch.tensor([LEVELS])}, "prompt"),
        ({"prompt": torch.tensor([0.5])}, "prompt.*Quantizer"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, "prompt"),
    ],
)
def test_what_cannot_be_generated_is_named(arguments: dict, named: str) -> None:
    """Mutation: drop any check."""
    with pytest.raises(InputError, match=named) as caught:
        generate(tiny(), **{"n_samples": 4, **arguments})
    assert "\n" not in str(caught.value)


def test_a_diverged_model_is_an_error_not_noise() -> None:
    """Mutation: drop the check of the nats."""
    model = tiny()
    with torch.no_grad():
        model.head.weight[3] = math.nan
    with pytest.raises(InputError, match="not finite"):
        generate(model, 4)
