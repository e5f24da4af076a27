"""Mixtures of sets of data, and data that change at a step: which examples come, and when."""

import collections
import functools

import numpy as np
import pytest

from mgen_jax.data import mixture, pipeline
from mgen_jax.data.buckets import Bucket

A, B = Bucket(1, 8, 8), Bucket(4, 8, 8)


class Numbers:
  """Examples that say which they are."""

  def __init__(self, length, first=0, name="numbers"):
    self.length, self.first = length, first
    self.digest = f"{name} {first} {length}"

  def __len__(self):
    return self.length

  def name(self, index):
    return f"{self.first + index}"

  def example(self, index, rng):
    return {"number": np.int64(self.first + index), "draw": np.float64(rng.random() if rng else 0)}


def sets(counts, step=1000):
  return [Numbers(count, first=step * n) for n, count in enumerate(counts)]


def passes(source):
  return [int(source.example(i, None)["number"]) for i in range(len(source))]


def test_without_weights_every_example_comes_once_in_a_pass():
  source = mixture.MixtureSource(sets((7, 0, 30)))
  assert sorted(passes(source)) == [*range(7), *range(2000, 2030)]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (3, 1), (1, 9)])
def test_with_weights_the_shares_are_exact_and_no_example_is_left_out(weights):
  source = mixture.MixtureSource(sets((10, 40)), weights)
  drawn = collections.Counter(n // 1000 for n in passes(source))
  share = weights[0] / sum(weights)
  assert abs(drawn[0] - share * len(source)) <= 1
  seen = collections.Counter(passes(source))
  assert len(seen) == 50
  for part in (0, 1):  # each as often as any other of its set
    often = [n for number, n in seen.items() if number // 1000 == part]
    assert max(often) - min(often) <= 1


def test_a_training_stream_keeps_the_shares():
  source = mixture.MixtureSource(sets((10, 90)), (3, 1))
  length = len(source)
  with pipeline.make_stream({A: source}, batch_sizes={A: 8}, seed=1) as stream:
    drawn = np.concatenate([next(stream)[1]["number"] for _ in range(length)])  # 8 passes
  assert abs((drawn < 1000).mean() - 0.75) <= 1 / length


def test_other_weights_are_other_data():
  prints = {mixture.MixtureSource(sets((10, 40)), w).digest for w in (None, (1, 1), (1, 2))}
  assert len(prints) == 3


def test_validation_sees_every_set_in_its_first_batch():
  source = mixture.EvenMixture(sets((2, 5, 0)))
  assert passes(source) == [0, 1000, 1, 1001, 1002, 1003, 1004]
  assert source.name(1) == "1000"


# Schedules.


def scheduled(phases, start=0, **options):
  make = functools.partial(pipeline.make_stream, **{"seed": 5, "threads": 1, **options})
  return mixture.Scheduled(phases, make, start)


def phase(first, sources, sizes, weights=None):
  return mixture.Phase(first, sources, sizes, weights or dict.fromkeys(sources, 1.0))


def draw(phases, start, stop, **options):
  stream = scheduled(phases, start, **options)
  try:
    return [next(stream) for _ in range(start, stop)]
  finally:
    stream.close()


def equal(one, other):
  assert [bucket for bucket, _ in one] == [bucket for bucket, _ in other]
  for (_, a), (_, b) in zip(one, other, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


CHANGES = [
  phase(0, {A: Numbers(60), B: Numbers(40, 100)}, {A: 8, B: 4}, {A: 2.0, B: 1.0}),
  phase(9, {A: Numbers(60), B: Numbers(40, 100)}, {A: 16, B: 8}, {A: 2.0, B: 1.0}),
  phase(14, {A: Numbers(60), B: Numbers(50, 500)}, {A: 16, B: 8}),
]


@pytest.mark.parametrize("start", [3, 9, 11, 14, 17])
def test_a_stream_may_start_at_any_step(start):
  equal(draw(CHANGES, start, 20), draw(CHANGES, 0, 20)[start:])


def test_hosts_together_draw_what_one_draws():
  one = draw(CHANGES, 0, 18)
  halves = [draw(CHANGES, 0, 18, process_index=p, process_count=2) for p in range(2)]
  joined = [
    (a[0], {key: np.concatenate([a[1][key], b[1][key]]) for key in a[1]})
    for a, b in zip(*halves, strict=True)
  ]
  equal(joined, one)


def test_a_change_of_the_batch_leaves_nothing_out_and_repeats_nothing():
  drawn = draw(CHANGES, 0, 14)
  numbers = np.concatenate([rows["number"] for bucket, rows in drawn if bucket == A])
  epochs = [numbers[i : i + 60] for i in range(0, len(numbers) - 59, 60)]
  assert len(epochs) >= 1
  for epoch in epochs:
    assert sorted(epoch) == list(range(60))
  draws = np.concatenate([rows["draw"] for bucket, rows in drawn if bucket == A])
  assert len(set(draws)) == len(draws)  # what is random in an example is new each time


def test_data_change_at_their_step_and_the_others_go_on():
  drawn = draw(CHANGES, 0, 20)
  of_b = [rows["number"].min() for bucket, rows in drawn[14:] if bucket == B]
  assert of_b and min(of_b) >= 500
  before = np.concatenate([r["number"] for b, r in drawn if b == B and r["number"].min() < 500])
  assert before.max() < 500


def test_one_phase_is_the_plain_stream():
  only = CHANGES[:1]
  with pipeline.make_stream(
    only[0].sources, batch_sizes=only[0].batch_sizes, weights=only[0].weights, seed=5
  ) as plain:
    equal(draw(only, 0, 12), [next(plain) for _ in range(12)])
    stream = scheduled(only)
    assert stream.fingerprint == plain.fingerprint  # an older checkpoint goes on
    stream.close()


def test_a_phase_to_come_may_change_and_one_that_was_may_not():
  def fingerprint(phases, at):
    stream = scheduled(phases, at)
    stream.close()
    return stream.fingerprint

  other = [*CHANGES[:2], phase(14, {A: Numbers(60)}, {A: 4})]
  assert fingerprint(CHANGES, 12) == fingerprint(other, 12)
  assert fingerprint(CHANGES, 14) == fingerprint(other, 14)  # it has not drawn yet
  assert fingerprint(CHANGES, 15) != fingerprint(other, 15)
  assert fingerprint(CHANGES[:1], 9) == fingerprint(CHANGES, 9)
  assert fingerprint(CHANGES[:1], 10) != fingerprint(CHANGES, 10)
