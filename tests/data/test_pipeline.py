"""The stream of batches is a function of (seed, step), whoever draws it and however.

Most tests use sources of numbers; the ones that decode use small mp4 files.
"""

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from mgen_jax.data import ingest, media, records
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.pipeline import check_shared_memory, make_ordered_stream, make_stream
from mgen_jax.data.prompts import Prompt, compose
from mgen_jax.data.sources import LatentSource, MediaSource, media_sources, window
from mgen_jax.errors import UserError

A, B, C = Bucket(1, 64, 64), Bucket(16, 64, 64), Bucket(24, 48, 80)
BATCHES = {A: 16, B: 8, C: 4}


class Numbers:
  """`count` examples, each its own number, with one random draw."""

  def __init__(self, count, first=0):
    self.count, self.first = count, first
    self.digest = f"{count} from {first}"

  def __len__(self):
    return self.count

  def name(self, index):
    return str(self.first + index)

  def example(self, index, rng):
    draw = 0.5 if rng is None else rng.random()
    return {"value": self.first + index, "draw": draw, "caption": f"number {index}"}


@pytest.fixture
def sources():
  return {A: Numbers(100), B: Numbers(60, 1000), C: Numbers(31, 2000)}


def draw(sources, steps, **options):
  """[(bucket, batch)] of the next `steps` steps."""
  options = {"batch_sizes": BATCHES, "seed": 7, "threads": 2} | options
  with make_stream(sources, **options) as stream:
    return [next(stream) for _ in range(steps)]


def assert_same(stream_a, stream_b):
  assert len(stream_a) == len(stream_b)
  for (bucket_a, a), (bucket_b, b) in zip(stream_a, stream_b, strict=True):
    assert bucket_a == bucket_b
    assert sorted(a) == sorted(b)
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_batches_joined_are_the_batches_of_one_process(sources, hosts):
  alone = draw(sources, 60)
  shares = [draw(sources, 60, process_index=p, process_count=hosts) for p in range(hosts)]
  for step, (bucket, batch) in enumerate(alone):
    assert {share[step][0] for share in shares} == {bucket}
    for key in batch:
      joined = np.concatenate([share[step][1][key] for share in shares])
      np.testing.assert_array_equal(joined, batch[key])


def test_hosts_agree_on_every_batch_and_restarts_on_every_step_of_ten_thousand():
  """1, 2 and 4 hosts, and 300 restarts at random steps with another number of them."""
  sources = {A: Numbers(60_000), B: Numbers(50_001), C: Numbers(64_000)}
  options = {
    "batch_sizes": {A: 8, B: 4, C: 4}, "weights": {A: 1.0, B: 2.5, C: 6.5}, "seed": 7, "threads": 0,
  }  # fmt: skip

  def drawn(host, hosts, steps=10_000, start=0):
    with make_stream(
      sources, process_index=host, process_count=hosts, start_step=start, **options
    ) as stream:
      return [
        (bucket, batch["value"].tolist()) for bucket, batch in itertools.islice(stream, steps)
      ]

  alone = drawn(0, 1)
  assert len({bucket for bucket, _ in alone}) == 3
  for hosts in (2, 4):
    shares = [drawn(host, hosts) for host in range(hosts)]
    for (bucket, values), *parts in zip(alone, *shares, strict=True):
      assert {part[0] for part in parts} == {bucket}
      assert [value for part in parts for value in part[1]] == values
  for start in np.random.default_rng(0).integers(10_000, size=300):
    hosts = (1, 2, 4)[start % 3]
    ((bucket, values),) = drawn(hosts - 1, hosts, 1, start=int(start))
    assert (bucket, values) == (alone[start][0], alone[start][1][-len(values) :])


@pytest.mark.parametrize("start", [1, 13, 40])
def test_a_stream_resumed_at_a_step_is_the_uninterrupted_one(sources, start):
  assert_same(draw(sources, 50 - start, start_step=start), draw(sources, 50)[start:])


def test_a_stream_resumes_on_another_number_of_hosts(sources):
  whole = draw(sources, 30)
  for p in range(4):
    for (_, part), (_, full) in zip(
      draw(sources, 10, start_step=20, process_index=p, process_count=4), whole[20:], strict=True
    ):
      rows = len(full["value"]) // 4
      np.testing.assert_array_equal(part["value"], full["value"][p * rows : (p + 1) * rows])


def test_the_examples_of_a_batch_can_be_named_without_reading_it(sources):
  with make_stream(sources, batch_sizes=BATCHES, seed=1) as stream:
    for step in range(12):
      bucket, names = stream.examples_at(step)
      drawn, batch = next(stream)
      assert bucket == drawn and names == [str(value) for value in batch["value"]]


def test_a_late_step_is_reached_at_once(sources):
  with make_stream(sources, batch_sizes=BATCHES, seed=7, start_step=10**12) as stream:
    assert next(stream)[0] == stream.bucket_at(10**12)
    assert stream.step == 10**12 + 1


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_the_number_of_threads_changes_nothing(sources, threads):
  assert_same(draw(sources, 40, threads=threads), draw(sources, 40))


def test_each_epoch_has_every_example_once_in_another_order():
  batches = draw({B: Numbers(64)}, 24)
  values = np.concatenate([batch["value"] for _, batch in batches]).reshape(3, 64)
  for epoch in values:
    assert sorted(epoch) == list(range(64))
  assert len({tuple(epoch) for epoch in values}) == 3
  assert tuple(values[0]) != tuple(range(64))


def test_seeds_and_buckets_have_orders_of_their_own():
  def first_epoch(**options):
    return [batch["value"].tolist() for _, batch in draw({B: Numbers(64)}, 8, **options)]

  assert first_epoch(seed=1) == first_epoch(seed=1)
  assert first_epoch(seed=1) != first_epoch(seed=2)
  two = draw({B: Numbers(64), C: Numbers(64)}, 24, batch_sizes={B: 8, C: 8}, seed=1)
  orders = [[b["value"].tolist() for bucket, b in two if bucket == which] for which in (B, C)]
  assert orders[0] != orders[1]


def test_random_draws_depend_on_the_position_and_differ_between_epochs():
  batches = draw({B: Numbers(8)}, 20)
  draws = np.concatenate([batch["draw"] for _, batch in batches])
  assert len(set(draws)) == len(draws)
  assert 0.4 < draws.mean() < 0.6


def test_buckets_are_mixed_in_proportion_to_their_weights(sources):
  weights = {A: 1.0, B: 2.5, C: 6.5}
  with make_stream(sources, batch_sizes=BATCHES, weights=weights, seed=0) as stream:
    order = [stream.bucket_at(step) for step in range(2000)]
    for bucket, weight in weights.items():
      for length in (10, 100, 2000):  # evenly spread, not only in the long run
        assert abs(order[:length].count(bucket) - weight / 10 * length) < 2.0
    for step in (0, 1, 17, 2000):
      assert stream.examples_before(step) == {
        bucket: order[:step].count(bucket) * BATCHES[bucket] for bucket in weights
      }
  assert [bucket for bucket, _ in draw(sources, 50, weights=weights)] == order[:50]


def test_without_weights_every_example_is_drawn_equally_often(sources):
  with make_stream(sources, batch_sizes=BATCHES, seed=0) as stream:
    examples = stream.examples_before(5000)
  epochs = [examples[bucket] / len(source) for bucket, source in sources.items()]
  assert max(epochs) - min(epochs) < 0.01 * max(epochs)


def test_a_weight_of_zero_leaves_a_bucket_out(sources):
  batches = draw(sources | {A: Numbers(0)}, 40, weights={A: 0, B: 1, C: 1})
  assert {bucket for bucket, _ in batches} == {B, C}


def test_a_bucket_smaller_than_its_batch_is_refused_unless_it_may_repeat(caplog):
  with pytest.raises(UserError, match=r"16x64x64 has 3 examples for a batch of 8: lower .* to 3"):
    draw({B: Numbers(3)}, 1)
  with caplog.at_level("WARNING"):
    ((_, batch),) = draw({B: Numbers(3)}, 1, repeat=True)
  assert "16x64x64 has 3 examples for a batch of 8" in caplog.text
  assert sorted(batch["value"][:3]) == sorted(batch["value"][3:6]) == [0, 1, 2]


def test_what_cannot_be_drawn_is_refused_in_a_sentence(sources):
  with pytest.raises(UserError, match="24x48x80 has no examples"):
    draw(sources | {C: Numbers(0)}, 1)
  with pytest.raises(UserError, match="no bucket is left"):
    draw({}, 1)
  with pytest.raises(UserError, match="weights are given for 16x64x64 but"):
    draw(sources, 1, weights={B: 1.0})
  with pytest.raises(UserError, match="weights are given"):
    draw(sources, 1, weights={A: 1.0, B: 1.0, C: -1.0})


@pytest.mark.parametrize(
  ("size", "hosts", "advice"), [(10, 4, "8 or 12"), (3, 4, "use 4"), (0, 2, "use 2")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(size, hosts, advice):
  with pytest.raises(UserError, match=f"batch of {size} .*{advice}"):
    draw({B: Numbers(9)}, 1, batch_sizes={B: size}, process_count=hosts)


def test_the_fingerprint_follows_what_decides_the_order_and_nothing_else(sources):
  def fingerprint(sources=sources, **options):
    options = {"batch_sizes": BATCHES, "seed": 7} | options
    with make_stream(sources, **options) as stream:
      return stream.fingerprint

  same = fingerprint()
  assert fingerprint(threads=1, start_step=9, process_index=1, process_count=2) == same
  others = [
    fingerprint(seed=8),
    fingerprint(batch_sizes=BATCHES | {A: 4}),
    fingerprint(weights={A: 1, B: 1, C: 5}),
    fingerprint(sources | {A: Numbers(101)}),
    fingerprint({B: sources[B]}),
  ]
  assert len({same, *others}) == 6


def test_a_transform_sees_the_same_randomness_everywhere(sources):
  def transform(example, rng):
    return {"value": example["value"], "noise": rng.normal(size=3)}

  alone = draw(sources, 20, transform=transform)
  for p in range(2):
    for (_, part), (_, full) in zip(
      draw(sources, 20, transform=transform, process_index=p, process_count=2), alone, strict=True
    ):
      rows = len(full["noise"]) // 2
      np.testing.assert_array_equal(part["noise"], full["noise"][p * rows : (p + 1) * rows])


def test_reading_begins_when_a_stream_is_opened(sources):
  """So that the first batches are there when the programs are compiled."""
  read = threading.Event()

  def transform(example, rng):
    read.set()
    return {"value": example["value"]}

  with make_stream(sources, batch_sizes=BATCHES, seed=0, transform=transform):
    assert read.wait(timeout=30)


def test_the_wait_for_each_batch_is_known(sources):
  with make_stream(sources, batch_sizes=BATCHES, seed=0) as stream:
    assert stream.wait_seconds == 0.0
    next(stream)
    assert stream.wait_seconds > 0.0


def test_an_ordered_stream_gives_every_example_once_in_order(sources):
  sizes = dict.fromkeys(sources, 8)
  values = {bucket: [] for bucket in sources}
  with make_ordered_stream(sources | {Bucket(2, 2, 2): Numbers(0)}, batch_sizes=sizes) as stream:
    for bucket, batch in stream:
      assert len(batch["value"]) == 8
      assert set(batch["draw"]) == {0.5}
      values[bucket] += batch["value"][batch["valid"]].tolist()
  for bucket, source in sources.items():
    assert values[bucket] == [source.first + i for i in range(len(source))]


def test_an_ordered_stream_is_shared_out_by_rows_too(sources):
  sizes = dict.fromkeys(sources, 8)
  with make_ordered_stream(sources, batch_sizes=sizes, seed=3) as stream:
    alone = list(stream)
  shares = []
  for p in range(2):
    with make_ordered_stream(
      sources, batch_sizes=sizes, seed=3, process_index=p, process_count=2
    ) as stream:
      shares.append(list(stream))
  assert len(shares[0]) == len(shares[1]) == len(alone)
  for step, (_, batch) in enumerate(alone):
    for key in batch:
      joined = np.concatenate([share[step][1][key] for share in shares])
      np.testing.assert_array_equal(joined, batch[key])


def test_an_ordered_stream_over_nothing_is_empty():
  for sources in ({}, {B: Numbers(0)}):
    with make_ordered_stream(sources, batch_sizes=BATCHES) as stream:
      assert list(stream) == []


def test_parts_of_a_long_source_have_random_draws_of_their_own():
  def draws(source):
    with make_ordered_stream({B: source}, batch_sizes=BATCHES, seed=1) as stream:
      return [batch["draw"].tolist() for _, batch in stream]

  assert draws(Numbers(8)) == draws(Numbers(8))
  assert draws(Numbers(8)) != draws(Numbers(8, first=8))


# --------------------------------------------------------------------------------------------------
# Real files.


def write_clip(path, frames, fps, height=64, width=64):
  """Frame j is grey of level 8 j: its number can be read back from its mean."""
  levels = (8 * np.arange(frames) + 4).astype(np.uint8)
  media.write_video(path, np.broadcast_to(
    levels[:, None, None, None], (frames, height, width, 3)
  ).copy(), fps)  # fmt: skip
  path.with_suffix(".txt").write_text(path.stem)


def frame_numbers(video):
  return np.rint((video.mean((-3, -2, -1)) - 4) / 8).astype(int)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  for i in range(6):
    write_clip(folder / f"square{i}.mp4", 16 + 2 * i, 8.0)
  for i in range(5):
    write_clip(folder / f"wide{i}.mp4", 30, 12.0, 72, 120)
  for i in range(4):
    media.write_image(folder / f"picture{i}.png", np.full((96, 96, 3), 44, np.uint8))
    (folder / f"picture{i}.txt").write_text("picture")
  return ingest.scan(folder, held_out=0.0)


SMALL = {Bucket(1, 32, 32): 4, Bucket(16, 32, 32): 2, Bucket(24, 24, 40): 2}


def test_media_batches_have_the_shape_of_their_bucket_and_consecutive_frames(clips):
  sources, groups = media_sources(clips, list(SMALL), split="train")
  assert groups.rejected == {}
  starts = set()
  for bucket, batch in draw(sources, 40, batch_sizes=SMALL):
    shape = (SMALL[bucket], bucket.frames, bucket.height, bucket.width, 3)
    assert batch["video"].shape == shape
    assert batch["video"].dtype == np.uint8
    for video, caption, start, fps in zip(
      batch["video"], batch["caption"], batch["start"], batch["fps"], strict=True
    ):
      numbers = frame_numbers(video)
      if bucket.is_image:
        assert (caption, numbers.tolist(), fps) == ("picture", [5], 0.0)
        continue
      own_rate = 8.0 if caption.startswith("square") else 12.0
      assert fps == own_rate
      assert numbers.tolist() == [round(start * own_rate) + j for j in range(bucket.frames)]
      starts.add((caption, start))
  assert len(starts) > 20  # windows move


def test_evaluation_takes_the_centre_window(clips):
  sources, _ = media_sources(clips, [Bucket(16, 32, 32)], split="train")
  with make_ordered_stream(sources, batch_sizes={Bucket(16, 32, 32): 3}) as stream:
    for _, batch in stream:
      for video, caption in zip(batch["video"], batch["caption"], strict=True):
        length = 16 + 2 * int(str(caption)[-1])
        assert frame_numbers(video)[0] == (length - 16 + 1) // 2


def test_a_rate_that_is_asked_for_is_the_rate_of_the_frames(clips):
  bucket = Bucket(8, 32, 32)
  sources, _ = media_sources(clips, [bucket], split="train", fps=4.0, max_crop=0.5)
  assert len(sources[bucket]) == 11
  for _, batch in draw(sources, 6, batch_sizes={bucket: 4}):
    for video, caption in zip(batch["video"], batch["caption"], strict=True):
      stride = 2 if caption.startswith("square") else 3
      assert set(np.diff(frame_numbers(video))) == {stride}
    assert set(batch["fps"]) == {4.0}


def test_a_range_of_rates_takes_whole_clips_and_the_text_says_the_rate(clips):
  """Movie Gen 3.4: a clip is sampled to N frames, and its rate stands before the prompt."""
  bucket = Bucket(12, 24, 40)
  sources, _ = media_sources(clips, [bucket], split="train", fps=(3.0, 8.0))
  assert len(sources[bucket]) == 5
  for _, batch in draw(sources, 2, batch_sizes={bucket: 5}):
    for video, start, fps in zip(batch["video"], batch["start"], batch["fps"], strict=True):
      assert (start, fps) == (0.0, pytest.approx(12 / 2.5))  # 30 frames at 12 a second
      assert frame_numbers(video).tolist() == [int((j + 0.5) * 2.5) for j in range(12)]
      assert compose(Prompt("a ball", fps), fps_prefix=True) == "FPS-5 a ball"
  # Too long for the lowest rate: a window of 12 / 6 s, anywhere.
  sources, _ = media_sources(clips, [bucket], split="train", fps=(6.0, 8.0))
  starts, rates = zip(
    *((s, f) for _, b in draw(sources, 8, batch_sizes={bucket: 5})
      for s, f in zip(b["start"], b["fps"], strict=True)), strict=True,
  )  # fmt: skip
  assert set(rates) == {6.0}
  assert len(set(starts)) > 3 and max(starts) <= 0.5


def test_images_drawn_from_videos_come_from_all_over_the_clip(clips):
  bucket = Bucket(1, 24, 40)
  sources, _ = media_sources(clips, [bucket], split="train", images_from_videos=True)
  batches = draw(sources, 20, batch_sizes={bucket: 4})
  numbers = np.concatenate([frame_numbers(batch["video"][:, 0]) for _, batch in batches])
  assert numbers.min() < 5
  assert numbers.max() > 24
  assert numbers.max() < 30


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999999])
@pytest.mark.parametrize(("frames", "fps"), [(1, None), (16, None), (16, 8.0), (30, 12.0)])
def test_a_window_never_leaves_its_clip(clips, place, frames, fps):
  clip = next(clip for clip in clips.clips if clip.path.startswith("wide"))
  start, duration = window(clip, frames, fps, place)
  assert start >= 0.0
  assert start + duration <= clip.frames / clip.fps + 1e-9


@pytest.mark.parametrize(("workers", "host"), [(2, 0), (3, 1)])
def test_a_stream_resumed_with_worker_processes_is_the_uninterrupted_one(clips, workers, host):
  """On another number of hosts, too: two in place of one."""
  sources, _ = media_sources(clips, list(SMALL), split="train")
  alone = draw(sources, 12, batch_sizes=SMALL)[5:]
  half = [(b, {k: np.split(a, 2)[host] for k, a in batch.items()}) for b, batch in alone]
  resumed = draw(
    sources,
    7,
    batch_sizes=SMALL,
    workers=workers,
    start_step=5,
    process_index=host,
    process_count=2,
  )
  assert_same(resumed, half)


def test_workers_that_would_fill_the_shared_memory_are_refused(tmp_path):
  check_shared_memory(2**60, 0, str(tmp_path))
  check_shared_memory(1, 2, str(tmp_path))
  check_shared_memory(2**60, 2, str(tmp_path / "there is none"))
  with pytest.raises(UserError, match="--shm-size"):
    check_shared_memory(2**60, 2, str(tmp_path))


def test_a_fault_in_a_worker_process_reaches_the_main_one_as_it_is(clips, tmp_path):
  bucket = Bucket(16, 32, 32)
  source = MediaSource(tmp_path / "moved away", clips.clips, bucket)
  with pytest.raises(UserError, match=r"clips in a row of .*moved away"):
    draw({bucket: source}, 1, batch_sizes={bucket: 2}, workers=1)


@pytest.mark.slow
def test_worker_processes_do_not_survive_a_killed_main_process(clips, tmp_path):
  clips.save(tmp_path)
  script = tmp_path / "train.py"
  script.write_text(f"""
import os, signal
from mgen_jax.data import ingest
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.pipeline import make_stream
from mgen_jax.data.sources import media_sources

if __name__ == "__main__":
  sources, _ = media_sources(ingest.load({str(tmp_path)!r}), [Bucket(16, 32, 32)], split="train")
  stream = make_stream(sources, batch_sizes={{Bucket(16, 32, 32): 2}}, seed=0, workers=2)
  print(next(stream)[0].name, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
""")
  # The output ends when the last process that can write to it has ended.
  run = subprocess.run(
    [sys.executable, script],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )
  assert run.returncode == -9
  assert run.stdout == "16x32x32\n"


def test_a_batch_outlives_its_stream_and_a_closed_stream_says_so(clips):
  sources, _ = media_sources(clips, list(SMALL), split="train")
  stream = make_stream(sources, batch_sizes=SMALL, seed=7, workers=1)
  bucket, batch = next(stream)
  stream.close()
  stream.close()
  assert type(batch["video"]) is np.ndarray
  assert_same([(bucket, batch)], draw(sources, 1, batch_sizes=SMALL))
  with pytest.raises(ValueError, match="closed"):
    next(stream)


def test_a_clip_damaged_after_it_was_indexed_is_replaced_with_a_warning(tmp_path, caplog):
  for i in range(4):
    write_clip(tmp_path / f"{i}.mp4", 16, 8.0)
  index = ingest.scan(tmp_path, held_out=0.0)
  bucket = Bucket(16, 32, 32)
  sources, _ = media_sources(index, [bucket], split="train")
  (tmp_path / "2.mp4").write_bytes(b"damaged")
  with make_ordered_stream(sources, batch_sizes={bucket: 4}) as stream:
    ((_, batch),) = list(stream)
  assert batch["caption"].tolist() == ["0", "1", "3", "3"]
  assert batch["index"].tolist() == [0, 1, 3, 3]
  assert "2.mp4" in caplog.text
  for i in range(4):
    (tmp_path / f"{i}.mp4").write_bytes(b"damaged")
  with pytest.raises(UserError, match="4 clips in a row"):
    draw(sources, 1, batch_sizes={bucket: 4})


def test_latents_stream_from_records(tmp_path):
  with records.RecordWriter(tmp_path / records.shard_name(0, 1)) as writer:
    for i in range(10):
      mean = np.full((2, 8, 8, 4), i, np.float16)
      writer.write(records.Record(f"c{i}", B.name, f"text {i}", 8.0, 0.5, {"mean": mean}))
  records.write_manifest(tmp_path, [writer.shard], bucket=B, settings={})
  source = LatentSource(records.open_records(tmp_path))
  for bucket, batch in draw({source.bucket: source}, 5, batch_sizes={B: 4}):
    assert bucket == B
    assert batch["mean"].shape == (4, 2, 8, 8, 4)
    assert batch["mean"].dtype == np.float16
    np.testing.assert_array_equal(batch["mean"][:, 0, 0, 0, 0], batch["index"])
    assert batch["caption"].tolist() == [f"text {i}" for i in batch["index"]]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_memory_stays_constant(clips):
  def resident_mib():
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

  sources, _ = media_sources(clips, list(SMALL), split="train")
  growth = []
  with make_stream(sources, batch_sizes=SMALL, seed=0, threads=2) as stream:
    for _ in range(5):
      before = resident_mib()
      for _ in range(50):
        next(stream)
      growth.append(resident_mib() - before)
  # A leak grows in every stretch; an allocator that takes a new arena grows in one of them.
  assert min(growth) < 1.0, growth
