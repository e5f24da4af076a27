"""The report is one small page that fetches nothing, shows everything and trusts no text."""

import base64
import dataclasses
import html.parser
import re

import numpy as np
import pytest

from mgen_jax.data import media
from mgen_jax.evaluation import report


def video(frames: int = 6, height: int = 16, width: int = 24) -> np.ndarray:
  t, y, x = np.mgrid[:frames, :height, :width]
  return np.stack([20 * t, 8 * y, 8 * x], axis=-1).astype(np.uint8)


def content(**changes) -> report.Content:
  clip = report.medium(video(), 8.0)
  lines = [
    {"step": step, "loss": 1 / step, "examples_per_second": 10.0, "mfu": None, "data_wait": 0.1}
    for step in range(10, 1000, 10)
  ]
  lines.insert(50, {"step": 500, "validation_loss": 0.01})
  made = report.Content(
    name="quickstart",
    made="today",
    figures=[
      report.Figure("colour right", "95%", "guessing 17%", "≥ 90%", True),
      report.Figure("shape right", "60%", "", "≥ 70%", False),
      report.Figure("all stages", "8 min 20 s"),
    ],
    samples=[
      report.Sample(
        "a small red circle moves left",
        7,
        clip,
        [
          ("colour", "red", "red", True),
          ("shape", "circle", "square", False),
          ("direction", None, "moves up", None),
        ],
      )
    ],
    samples_note="The first of many.",
    pairs=[
      report.Pair("an image", "30.0 dB", report.medium(report.beside(video(1), video(1)), 8.0))
    ],
    pairs_note="Left and right.",
    stages=[
      report.Stage("ingest", "ingest", 3.0),
      report.Stage("t2v", "train", 340.0, 990, lines),
    ],
    data=[("clips", "1,600")],
    skipped=[("bad.mp4", "bad.mp4 is truncated.")],
    buckets=[("16x64x64", 760, 40)],
    versions=[("jax", "0.10.2")],
    command="python -m mgen_jax.sample --workdir=runs/quickstart --prompt='a red circle'",
    config='{"name": "quickstart"}',
  )
  return dataclasses.replace(made, **changes)


class Page(html.parser.HTMLParser):
  """Tags with their attributes, and the text, of a page."""

  def __init__(self, page: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.text = ""
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data

  def all(self, name: str) -> list[dict]:
    return [attributes for tag, attributes in self.tags if tag == name]


def test_nothing_is_fetched_and_nothing_runs():
  page, _ = report.render(content())
  assert "http:" not in page and "https:" not in page
  parsed = Page(page)
  sources = [a[key] for _, a in parsed.tags for key in ("src", "href", "xlink:href") if key in a]
  assert sources and all(source.startswith(("data:", "#")) for source in sources)
  names = {tag for tag, _ in parsed.tags}
  assert not names & {"script", "link", "iframe", "object"}
  policies = [meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta]
  assert policies[0].startswith("default-src 'none'")


def test_videos_play_by_themselves_without_sound():
  page, _ = report.render(content())
  (tag,) = Page(page).all("video")
  assert {"autoplay", "muted", "loop", "playsinline"} <= set(tag)
  kind, data = tag["src"].split(",", 1)
  assert kind == "data:video/mp4;base64"
  frames = media.read_video(base64.b64decode(data))
  assert frames.shape == (6, 32, 48, 3)  # doubled, so that no colour is shared between pixels
  np.testing.assert_allclose(frames[:, ::2, ::2].astype(int), video().astype(int), atol=12)


def test_verdicts_and_targets_are_marked():
  page = Page(report.render(content())[0])
  tags = [attributes["class"] for attributes in page.all("span")]
  assert tags == ["tag good", "tag bad", "tag good", "tag bad"]  # two targets, two verdicts
  assert "✓ colour" in page.text and "✗ square" in page.text
  assert "moves up" not in page.text  # nobody asked for a direction


def test_everything_that_it_is_given_is_there():
  text = Page(report.render(content())[0]).text
  for part in (
    *("quickstart", "95%", "8 min 20 s", "a small red circle moves left", "seed 7", "30.0 dB"),
    *("1,600", "bad.mp4 is truncated.", "16x64x64", "0.10.2", "5 min 40 s", '{"name":'),
    "python -m mgen_jax.sample --workdir=runs/quickstart --prompt='a red circle'",
  ):
    assert part in text


def test_text_of_users_stays_text():
  evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
  sample = dataclasses.replace(content().samples[0], prompt=evil)
  stage = dataclasses.replace(content().stages[1], name=evil)
  changed = content(
    name=evil, samples=[sample], skipped=[(evil, evil)], stages=[stage], config=evil
  )
  page = Page(report.render(changed)[0])
  assert not page.all("script") and len(page.all("img")) == 1
  assert page.text.count(evil) >= 5


def test_columns_that_say_nothing_are_left_out():
  heads = re.findall(r"<th[^>]*>([^<]*)</th>", report.render(content())[0])
  assert "examples/s" in heads and "MFU" not in heads


def test_a_loss_curve_takes_the_colour_of_the_text_and_fits_any_width():
  curve = report.loss_curve(content().stages[1])
  head = curve[: curve.index(">")]
  assert "currentColor" in curve and "viewBox" in head and "width=" not in head
  assert ">held out<" in curve
  assert report.loss_curve(report.Stage("ingest", "ingest", 1.0)) is None


def test_a_long_run_makes_no_long_page():
  lines = [{"step": step, "loss": 1.0 + 1 / step} for step in range(1, 50_000)]
  assert len(report.loss_curve(report.Stage("long", "train", 1.0, 50_000, lines))) < 100_000


def test_samples_beyond_the_size_of_a_page_are_left_out_with_a_note():
  noise = np.random.default_rng(0).integers(0, 256, (16, 200, 200, 3), dtype=np.uint8)
  sample = dataclasses.replace(content().samples[0], medium=report.medium(noise, 8.0))
  page, shown = report.render(content(samples=[sample] * 20))
  assert 0 < shown < 20 and len(page) < 5_000_000
  assert f"{20 - shown} more are left out" in Page(page).text


def test_it_is_written_whole(tmp_path):
  path = tmp_path / "report.html"
  assert report.write(path, content()) == 1
  assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
  assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(3.21, "3.2 s"), (42, "42 s"), (59.7, "60 s"), (500, "8 min 20 s"), (7325, "2 h 2 min")],
)
def test_durations_are_easy_to_read(seconds, text):
  assert report.duration(seconds) == text
