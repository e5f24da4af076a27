"""Videos for the tests of stages that see frames, and the short way from a video to its scores."""

import numpy as np

from data_pipelines.curate.decode import Limits, decode_frames
from data_pipelines.curate.stage import Frame, FrameStage
from mgen_jax.data.marbles.render import render
from mgen_jax.data.marbles.world import WorldConfig, sample_scene
from mgen_jax.data.media import write_video


def scene(seed: int, **world):
  """A Marbles scene of these words."""
  return sample_scene(seed, WorldConfig(**{name: tuple(words) for name, words in world.items()}))


def moving(seed: int, seconds=3.0, fps=12, height=96, width=160) -> np.ndarray:
  """A clip without a defect on a textured background: uint8 [T, H, W, 3]."""
  shown = scene(seed, backgrounds=["noisy"], motions=["moves left", "moves right", "bounces"])
  return render(shown, round(seconds * fps), height, width, fps)


def texture(seed: int, height: int, width: int) -> np.ndarray:
  """Smooth random grey, uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(30, 225, (height // 6 + 3, width // 6 + 3))
  y, x = np.arange(height) / 6, np.arange(width) / 6
  i, j = y.astype(int), x.astype(int)
  fy, fx = (y - i)[:, None], (x - j)[None]
  grey = (coarse[i][:, j] * (1 - fx) + coarse[i][:, j + 1] * fx) * (1 - fy)
  grey += (coarse[i + 1][:, j] * (1 - fx) + coarse[i + 1][:, j + 1] * fx) * fy
  return np.repeat(grey[..., None].astype(np.uint8), 3, axis=2)


def sliding(step: tuple[int, int], frames: int, height=96, width=160, seed=0) -> np.ndarray:
  """A textured picture that a camera passes over by (x, y) pixels a frame: [T, H, W, 3]."""
  room = frames * max(map(abs, step)) + 8
  large = texture(seed, height + 2 * room, width + 2 * room)
  tops = [room + t * step[1] for t in range(frames)]
  lefts = [room + t * step[0] for t in range(frames)]
  return np.stack([large[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)])


def scores(stage: FrameStage, path, row=None) -> dict:
  """What a stage says of a whole file."""
  observer = stage.observer(row or {})
  for index, (time, pts, forms) in enumerate(
    decode_frames(str(path), Limits(), vectors=stage.native)
  ):
    observer.frame(Frame(index, time, pts, forms, forms.frame))
  return observer.scores()


def scores_of(stage: FrameStage, video: np.ndarray, fps: float, folder, **options) -> dict:
  """The same of pictures, by way of a file."""
  path = folder / "video.mp4"
  write_video(path, video, fps, **options)
  return scores(stage, path)


def fails(stage: FrameStage, columns: dict) -> bool:
  """Whether one of the stage's rules rejects these scores."""
  for rule in stage.rules():
    value = columns[rule.column]
    low, high = rule.at_least, rule.at_most
    if low is not None and (value <= low if rule.strict else value < low):
      return True
    if high is not None and (value >= high if rule.strict else value > high):
      return True
  return False
