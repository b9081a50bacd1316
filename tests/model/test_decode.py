"""The engine: what an episode samples depends on its weights, tokens and seed alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decode import Engine
from model.logprobs import token_logprobs
from model.qwen3 import bind
from tests.model.conftest import logits, random_params

SLOTS, MAX_LEN, STOP = 6, 300, 7


@pytest.fixture(scope="module")
def engine(small, small_params) -> Engine:
    """One engine for all tests: each leaves its slots closed."""
    engine = Engine(
        small_params, small, SLOTS, MAX_LEN, prefill_chunk=16, prefill_rows=3, decode_tokens=4
    )
    engine.warmup()
    return engine


def _tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, 101, count).tolist()


class _Episode:
    """Turns of environment tokens and sampled ones, one state machine per slot."""

    def __init__(self, engine: Engine, seed: int, turns: list[tuple[int, int]]) -> None:
        self.engine, self.seed, self.turns = engine, seed, turns
        self.slot = engine.open()
        self.ids: list[int] = []
        self.logprobs: list[tuple[int, float]] = []  # (index in ids, logprob)
        self.turn = 0
        self.begin()

    def begin(self) -> None:
        extend, new = self.turns[self.turn]
        given = _tokens(extend, 1000 * self.seed + self.turn)
        self.engine.extend(self.slot, given)
        self.ids += given
        self.engine.sample(self.slot, max_new=new, stop_ids=(STOP,), seed=self.seed)

    def done(self, result) -> bool:
        start = len(self.ids)
        self.ids += result.ids
        self.logprobs += [(start + i, lp) for i, lp in enumerate(result.logprobs)]
        assert (result.finish == "stop") == (result.ids[-1] == STOP)
        assert result.finish == "stop" or len(result.ids) == self.turns[self.turn][1]
        assert STOP not in result.ids[:-1]
        self.turn += 1
        if self.turn == len(self.turns):
            self.engine.close(self.slot)
            return True
        self.begin()
        return False


TURNS = {
    1: [(40, 10), (5, 30), (33, 7)],
    2: [(1, 20), (1, 20), (90, 20)],
    3: [(150, 12), (60, 12)],
    4: [(17, 60), (16, 60)],
    5: [(200, 50)],
}


def _run(engine: Engine, seeds: list[int], delay: int = 0) -> dict[int, _Episode]:
    """Run episodes together, the next one entering ``delay`` steps after the one before it."""
    waiting = list(seeds)
    running: dict[int, _Episode] = {}
    finished: dict[int, _Episode] = {}
    for step in range(10_000):
        while waiting and step >= delay * (len(seeds) - len(waiting)):
            episode = _Episode(engine, waiting[0], TURNS[waiting.pop(0)])
            running[episode.slot] = episode
        if not running and not waiting:
            return finished
        for result in engine.step():
            episode = running.pop(result.slot)
            if episode.done(result):
                finished[episode.seed] = episode
            else:
                running[episode.slot] = episode
    raise AssertionError("the engine does not finish")


@pytest.fixture(scope="module")
def alone(engine) -> dict[int, _Episode]:
    return {seed: _run(engine, [seed])[seed] for seed in TURNS}


@pytest.mark.parametrize(
    ("order", "delay"),
    [([1, 2, 3, 4, 5], 0), ([5, 4, 3, 2, 1], 1), ([3, 5, 1, 4, 2], 3), ([2, 1, 4], 2)],
)
def test_bitwise_independent_of_neighbours_slot_and_timing(engine, alone, order, delay):
    together = _run(engine, order, delay)
    for seed in order:
        assert together[seed].ids == alone[seed].ids
        assert together[seed].logprobs == alone[seed].logprobs  # exactly


def test_bitwise_independent_of_the_slot_index(engine, alone):
    for used in range(1, SLOTS):
        held = [engine.open() for _ in range(used)]
        again = _run(engine, [1])[1]
        assert again.ids == alone[1].ids
        assert again.logprobs == alone[1].logprobs
        for slot in held:
            engine.close(slot)


class _Sibling(_Episode):
    """Reads what its group reads; draws by its own seed."""

    def begin(self) -> None:
        extend, new = self.turns[self.turn]
        given = _tokens(extend, 500 + self.turn)
        self.engine.extend(self.slot, given)
        self.ids += given
        self.read = tuple(self.ids)
        self.engine.sample(
            self.slot, max_new=new, stop_ids=(STOP,), seed=self.seed, temperature=0.05
        )


def _wipe(engine: Engine) -> None:
    """No row holds anything that a test may share."""
    for slot in [engine.open() for _ in range(SLOTS)]:
        engine.extend(slot, [1])
        engine.close(slot)


def _family(engine: Engine, seeds: list[int], delay: int) -> dict[int, _Sibling]:
    """A group with a first turn that many draw alike, so that some share the second prompt too."""
    waiting, running, finished = list(seeds), {}, {}
    for step in range(10_000):
        while waiting and step >= delay * (len(seeds) - len(waiting)):
            sibling = _Sibling(engine, waiting.pop(0), [(40, 2), (70, 9)])
            running[sibling.slot] = sibling
        if not running and not waiting:
            break
        for result in engine.step():
            sibling = running.pop(result.slot)
            if sibling.done(result):
                finished[sibling.seed] = sibling
            else:
                running[sibling.slot] = sibling
    return finished


@pytest.mark.parametrize("delay", [0, 1, 5, 40])
def test_siblings_compute_once_what_they_share_and_not_a_bit_changes(
    engine, small, small_params, delay
):
    single = Engine(
        small_params, small, SLOTS, MAX_LEN, prefill_chunk=16, prefill_rows=3, decode_tokens=4
    )
    seeds = list(range(SLOTS))
    alone = {}
    for seed in seeds:
        _wipe(single)
        alone |= _family(single, [seed], 0)
    _wipe(engine)
    before = engine.prefilled
    together = _family(engine, seeds, delay)
    for seed in seeds:
        assert together[seed].ids == alone[seed].ids
        assert together[seed].logprobs == alone[seed].logprobs
    second = {together[seed].read for seed in seeds}
    assert 1 < len(second) < SLOTS
    assert engine.prefilled - before == 39 + 70 * len(second)


def test_a_sibling_that_closes_leaves_the_work_to_the_next(engine, alone):
    def begin(seed: int) -> _Episode:
        return _Episode(engine, seed, TURNS[seed])

    _wipe(engine)
    first, second, third, again = (begin(3) for _ in range(4))
    engine.close(second.slot)  # it followed
    engine.close(first.slot)  # it led
    with pytest.raises(ValueError, match="is sampling"):
        engine.extend(again.slot, [9])
    left = {e.slot: e for e in (third, again)}
    while left:
        for result in engine.step():
            if left[result.slot].done(result):
                episode = left.pop(result.slot)
                assert episode.ids == alone[3].ids
                assert episode.logprobs == alone[3].logprobs


def test_new_weights_share_nothing_with_the_old(small, small_params):
    engine = Engine(small_params, small, 2, 64, prefill_chunk=16, prefill_rows=3)
    slots = []
    for version in (0, 1):
        engine.set_params(small_params, version)
        slots.append(engine.open())
        engine.extend(slots[-1], _tokens(30, 1))
        engine.sample(slots[-1], max_new=1)
        while not engine.step():
            pass
    assert engine.prefilled == 2 * 29


def test_a_second_extend_before_the_first_is_computed(small, small_params):
    engine = Engine(small_params, small, 3, 64, prefill_chunk=16, prefill_rows=3)

    def sample(cuts: list[list[int]], also: bool) -> tuple[list[int], list[float]]:
        slot, other = engine.open(), engine.open()
        if also:
            engine.extend(other, cuts[0])  # this one leads
        for ids in cuts:
            engine.extend(slot, ids)
        engine.sample(slot, max_new=8)
        while not (done := engine.step()):
            pass
        engine.close(slot)
        engine.close(other)
        return done[0].ids, done[0].logprobs

    given = _tokens(50, 2)
    cuts = [given[:20], given[20:21], given[21:]]
    first = sample(cuts, also=True)
    sample([_tokens(40, 3)], also=False)
    assert sample(cuts, also=False) == first


def test_logprobs_match_the_training_forward(small, small_params, alone):
    @jax.jit
    def score(ids):
        model = bind(small, small_params)
        hidden, _ = model(ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
        flat = hidden[:, :-1].reshape(-1, small.hidden_size)
        return token_logprobs(flat, model.head(), ids[:, 1:].reshape(-1))[0].reshape(len(ids), -1)

    assert sum(len(episode.logprobs) for episode in alone.values()) > 100
    ids = np.zeros((len(alone), MAX_LEN), np.int32)
    for row, episode in zip(ids, alone.values(), strict=True):
        row[: len(episode.ids)] = episode.ids
    for want, episode in zip(np.asarray(score(ids)), alone.values(), strict=True):
        index = np.array([i for i, _ in episode.logprobs])
        got = np.array([lp for _, lp in episode.logprobs])
        np.testing.assert_allclose(got, want[index - 1], atol=1e-4)


def test_nothing_is_compiled_after_warmup(engine, alone):
    _run(engine, [4, 2, 5])
    assert engine.compiled == 3


def _sample(engine: Engine, prompt: list[int], **how) -> list[int]:
    slot = engine.open()
    engine.extend(slot, prompt)
    engine.sample(slot, **how)
    while True:
        for result in engine.step():
            engine.close(slot)
            return result.ids


def test_greedy_takes_the_likeliest(small, small_params, engine):
    prompt = _tokens(20, 0)
    got = _sample(engine, prompt, max_new=12, temperature=0.0)
    likeliest = logits(small, small_params, jnp.asarray([prompt + got]))[0].argmax(-1)
    assert got == likeliest[len(prompt) - 1 : -1].tolist()


def _histogram(engine: Engine, prompt: list[int], draws: int, **how) -> np.ndarray:
    counts = np.zeros(101)
    slots = [engine.open() for _ in range(SLOTS)]
    seed = 0
    for slot in slots:
        engine.extend(slot, prompt)
    while seed < draws:
        for slot in slots:
            engine.sample(slot, max_new=1, seed=seed, **how)
            seed += 1
        results = engine.step()
        while len(results) < SLOTS:
            results += engine.step()
        for result in results:
            counts[result.ids[0]] += 1
        for slot in slots:  # the same prefix again: a new episode in the same slot
            engine.close(slot)
        slots = [engine.open() for _ in slots]
        for slot in slots:
            engine.extend(slot, prompt)
    for slot in slots:
        engine.close(slot)
    return counts


def test_samples_follow_the_tempered_distribution(small, small_params, engine):
    prompt, temperature, draws = _tokens(5, 1), 0.5, 1800
    counts = _histogram(engine, prompt, draws, temperature=temperature)
    last = logits(small, small_params, jnp.asarray([prompt]))[0, -1]
    p = np.asarray(jax.nn.softmax(last / temperature))
    chi2 = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert chi2 < 101 + 5 * (2 * 101) ** 0.5


def test_truncation_keeps_to_the_top(small, small_params):
    engine = Engine(small_params, small, 2, 64, prefill_chunk=8, prefill_rows=1, truncation=True)
    prompt = _tokens(6, 2)
    p = np.asarray(jax.nn.softmax(logits(small, small_params, jnp.asarray([prompt]))[0, -1]))
    order = np.argsort(-p)
    four = float(np.cumsum(p[order])[2:4].mean())  # the fourth entry crosses this mass
    for how, allowed in (({"top_k": 3}, order[:3]), ({"top_p": four}, order[:4])):
        seen = {_sample(engine, prompt, max_new=1, seed=s, **how)[0] for s in range(200)}
        assert seen <= set(allowed.tolist())
        assert len(seen) > 1 or p[order[1]] < 0.02
    assert {_sample(engine, prompt, max_new=1, seed=s)[0] for s in range(200)} - set(order[:4])


def test_new_weights_count_from_the_next_step_and_are_recorded(small, small_params, engine):
    slot = engine.open()
    engine.extend(slot, _tokens(10, 3))
    engine.sample(slot, max_new=12, temperature=0.0)
    assert engine.step() == []
    engine.set_params(random_params(small, 9), 5)
    result = engine.step() + engine.step()
    assert result[0].versions == [0] * 4 + [5] * 8 and result[0].version == 5
    engine.close(slot)
    engine.set_params(jax.tree.map(np.asarray, small_params), 0)  # from wherever they come
    assert len(_sample(engine, _tokens(10, 3), max_new=2)) == 2
    assert engine.compiled == 3


def test_limits_are_kept(engine):
    slot = engine.open()
    with pytest.raises(ValueError, match="empty"):
        engine.sample(slot, max_new=1)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.extend(slot, [101])
    with pytest.raises(ValueError, match="fit"):
        engine.extend(slot, [9] * (MAX_LEN + 1))
    engine.extend(slot, [9] * (MAX_LEN - 3))
    engine.sample(slot, max_new=50)
    with pytest.raises(ValueError, match="sampling"):
        engine.extend(slot, [9])
    results = []
    while not results:
        results = engine.step()
    assert len(results[0].ids) == 3 and results[0].finish == "length"
    assert engine.room(slot) == 0
    engine.sample(slot, max_new=5)
    (result,) = engine.step()
    assert result.ids == [] and result.finish == "length"
    engine.close(slot)
    with pytest.raises(ValueError, match="not open"):
        engine.extend(slot, [9])


def test_slots_run_out_and_a_closed_one_forgets(engine, alone):
    slots = [engine.open() for _ in range(SLOTS)]
    with pytest.raises(RuntimeError, match="in use"):
        engine.open()
    for slot in slots:  # closed in the middle of prefill and of sampling
        engine.extend(slot, _tokens(100, slot))
        engine.sample(slot, max_new=100, seed=slot)
    engine.step()
    for slot in slots:
        engine.close(slot)
    assert engine.step() == []
    assert _run(engine, [2])[2].ids == alone[2].ids
