"""Captions: who writes them, the mixture, the prompt; with a real server on this machine."""

import base64
import contextlib
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import captioners
from data_pipelines.curate.captioners import CaptionerConfig
from data_pipelines.curate.stages import captions, sidecar
from mgen_jax.errors import ConfigError, UserError
from tests.data_pipelines.curate.looking import show

CLIP = {
  "source_id": "ab" * 32, "copy": 0, "path": "day 1/a.mp4", "start_pts": 0, "end_pts": 5,
  "source_caption": "a dog",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextlib.contextmanager
def server(answer):
  """An OpenAI-compatible server on a free port; answer(request, number) -> (status, body)."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      asked.append((self.path, self.headers["Authorization"], body))
      status, reply = answer(body, len(asked))
      data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
      self.send_response(status)
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *arguments):
      pass

  httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
  finally:
    httpd.shutdown()
    httpd.server_close()


def says(text):
  return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def video(frames=20, height=60, width=100):
  levels = np.linspace(0, 250, frames).astype(np.uint8)
  return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def test_a_server_is_shown_the_frames_and_asked_the_question(monkeypatch):
  monkeypatch.setenv("MY_KEY", "secret")
  with server(lambda body, n: (200, says("  A grey field\n becomes bright. "))) as (url, asked):
    settings = captions.Captions(
      first=CaptionerConfig(
        kind="server", url=url, model="vlm-8b", name="8B", frames=4, side=50, key_variable="MY_KEY"
      )
    )
    found = show(settings, video(), **CLIP)
  assert found == {"caption": "A grey field becomes bright.", "caption_words": 5, "captioner": "8B"}
  ((path, key, body),) = asked
  assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "vlm-8b"
  words, *pictures = body["messages"][0]["content"]
  assert words["text"] == captioners.QUESTION and len(pictures) == 4
  shown = [
    Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))))
    for p in pictures
  ]  # fmt: skip
  assert {picture.size for picture in shown} == {(50, 30)}
  levels = [np.asarray(picture).mean() for picture in shown]
  wanted = video()[[3, 8, 13, 18], 0, 0, 0]  # the first at or after the middles of four quarters
  assert levels == pytest.approx(wanted.astype(float), abs=3)


def test_a_busy_server_is_asked_again_and_a_wrong_question_is_not(monkeypatch):
  monkeypatch.setattr(captioners.time, "sleep", lambda seconds: None)
  config = CaptionerConfig(kind="server", model="vlm")
  with server(lambda body, n: (503, {}) if n < 3 else (200, says("yes"))) as (url, asked):
    made = captioners.Server(captioners.dataclasses.replace(config, url=url))
    assert made.caption({}, []) == "yes" and len(asked) == 3
  with server(lambda body, n: (404, {"error": "no such model"})) as (url, asked):
    made = captioners.Server(captioners.dataclasses.replace(config, url=url))
    with pytest.raises(UserError, match="404"):
      made.caption({}, [])
    assert len(asked) == 1
  for reply in (b"<html>", {"choices": []}):
    with server(lambda body, n, reply=reply: (200, reply)) as (url, asked):
      made = captioners.Server(captioners.dataclasses.replace(config, url=url))
      with pytest.raises(UserError, match=r"no JSON|without choices"):
        made.caption({}, [])
  with pytest.raises(UserError, match="run again"):  # nobody is there any more
    made.caption({}, [])


def test_two_captioners_share_the_clips_seven_to_three():
  first = CaptionerConfig(kind="template", name="8B", template="small {height}")
  second = CaptionerConfig(kind="template", name="70B", template="large {width}")
  settings = captions.Captions(first=first, second=second, first_share=0.7)
  chosen = [settings.choice(f"clip {i}")[0].name for i in range(3000)]
  assert abs(chosen.count("8B") / 3000 - 0.7) < 0.02
  assert chosen == [settings.choice(f"clip {i}")[0].name for i in range(3000)]
  found = {show(settings, video(4), **{**CLIP, "start_pts": i})["caption"] for i in range(20)}
  assert found == {"small 60", "large 100"}


def test_where_one_has_nothing_to_say_the_other_is_asked():
  settings = captions.Captions()  # the source's own text, else a template
  found = show(settings, video(20, 60, 100), **CLIP)
  assert (found["caption"], found["captioner"]) == ("a dog", "sidecar")
  silent = show(settings, video(16, 60, 100), **{**CLIP, "source_caption": ""})
  assert silent["caption"] == "A landscape video of 2 seconds."
  assert silent["captioner"] == "template"
  alone = captions.Captions(second=None)
  assert show(alone, video(), **{**CLIP, "source_caption": ""})["caption_words"] == 0


def test_a_batch_is_found_by_clip_or_by_file(tmp_path):
  from data_pipelines.curate.stage import clip_id

  path = tmp_path / "batch.jsonl"
  rows = [
    {"clip_id": clip_id(CLIP, CLIP), "caption": "of the\nclip"},
    {"file": "day 1/a.mp4", "caption": "of the file"},
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  settings = captions.Captions(first=CaptionerConfig(kind="batch", file=str(path)))
  assert show(settings, video(4), **CLIP)["caption"] == "of the clip"
  other = {**CLIP, "start_pts": 99}
  assert show(settings, video(4), **other)["caption"] == "of the file"
  before = settings.scorer()
  path.write_text(path.read_text() + "\n\n")
  assert settings.scorer() != before  # other captions are another version
  path.write_text('{"clip_id": 3}\n')
  with pytest.raises(UserError, match="line 1"):
    captioners.Batch(settings.first)


def test_captioners_that_cannot_be_are_refused():
  for values, said in (
    ({"kind": "server"}, "model is empty"),
    ({"kind": "server", "model": "m", "url": "file:///etc/passwd"}, "http"),
    ({"kind": "batch"}, "file is empty"),
    ({"template": "{width.__class__}"}, "known"),
    ({"template": "{colour}"}, "known"),
    ({"template": "{width"}, "no format"),
    ({"frames": 0}, "at least 1"),
  ):
    with pytest.raises(ConfigError, match=said):
      CaptionerConfig(**values)
  with pytest.raises(ConfigError, match="from 0 to 1"):
    captions.Captions(first_share=1.5)


def test_the_prompt_is_what_the_encoders_read():
  """Movie Gen 3.4 and 3.2.1: the rate, then a camera's move that is sure, then the caption."""
  stage = captions.Prompts(min_confidence=0.8)
  row = {
    "caption": "A dog runs.",
    "camera": "zoom in",
    "camera_confidence": 0.9,
    "bucket_fps": 23.8,
  }
  assert stage.score(row) == {
    "caption_camera": "zoom in",
    "prompt": "FPS-24 zoom in. A dog runs.",
  }
  unsure = stage.score({**row, "camera_confidence": 0.5})
  assert unsure == {"caption_camera": "", "prompt": "FPS-24 A dog runs."}
  assert stage.score({**row, "caption": ""})["prompt"] == ""
  assert stage.score({"bucket_fps": 16.0})["prompt"] == ""


def test_the_text_beside_a_file_and_the_line_that_wins(tmp_path):
  stage = sidecar.Sidecar()
  for name in ("a", "b"):
    (tmp_path / f"{name}.mp4").touch()
  (tmp_path / "a.txt").write_text("\ufeffa dög\n runs ", encoding="utf-8")
  assert stage.score(str(tmp_path / "a.mp4")) == {"source_caption": "a dög runs"}
  assert stage.score(str(tmp_path / "b.mp4")) == {"source_caption": ""}
  lines = tmp_path / "captions.jsonl"
  lines.write_text('{"file": "a.mp4", "caption": "a line"}\n')
  assert stage.score(str(tmp_path / "a.mp4")) == {"source_caption": "a line"}
  elsewhere = tmp_path / "all.jsonl"
  end = f"{tmp_path.name}/b.mp4"
  elsewhere.write_text(json.dumps({"file": end, "caption": "from afar"}) + "\n")
  named = sidecar.Sidecar(file=str(elsewhere))
  assert named.score(str(tmp_path / "b.mp4")) == {"source_caption": "from afar"}
  assert named.scorer() != stage.scorer()
  (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
  with pytest.raises(UserError, match=r"b\.txt is not UTF-8 \(byte 2\)"):
    stage.score(str(tmp_path / "b.mp4"))
  lines.write_text('{"file": "a.mp4"}\n')
  with pytest.raises(UserError, match="line 1"):
    stage.score(str(tmp_path / "a.mp4"))
  with pytest.raises(UserError, match="is no file"):
    sidecar.Sidecar(file=str(tmp_path / "none")).scorer()
