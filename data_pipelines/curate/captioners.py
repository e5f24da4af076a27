"""Who writes captions: a server, the file of a batch, the source's own text, a template.

A captioner is made from its settings and asked for the text of one clip at a time; only a server
sees frames. What it is asked is part of the settings, so a new question is a new version. Not here:
which of two captioners a clip gets (`stages/captions`).
"""

import base64
import dataclasses
import functools
import json
import os
import string
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import cv2
import numpy as np

from data_pipelines.curate.stages import sidecar
from mgen_jax.errors import ConfigError, UserError

QUESTION = (
  "Describe this video in one paragraph of about 100 words: the subjects and what they do, the"
  " place, the light, the style. Do not mention that it is a video, and do not guess what is not"
  " shown."
)
TEMPLATE = "A {orientation} video of {seconds:.0f} seconds."
_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
  """One captioner.

  Attributes:
    kind: "server" asks an OpenAI-compatible one, "batch" reads lines {"clip_id" or "file": ...,
      "caption": ...} that were made elsewhere, "sidecar" takes the source's own text, "template"
      fills in what is known of the clip.
    name: what the records call it ("8B", "70B").
    url: of the server, up to and with /v1.
    model: as the server calls it.
    question: what it is asked about the frames.
    frames, side: how many it sees, and their longer side in pixels.
    max_tokens, timeout: of an answer; in tokens and seconds.
    key_variable: the environment variable with the server's key; the key itself is in no file.
    file: of the batch.
    template: with {orientation}, {seconds}, {width}, {height}, {fps}, {source_caption}.
  """

  kind: Literal["server", "batch", "sidecar", "template"] = "template"
  name: str = ""
  url: str = "http://127.0.0.1:8000/v1"
  model: str = ""
  question: str = QUESTION
  frames: int = 8
  side: int = 512
  max_tokens: int = 300
  timeout: float = 120.0
  key_variable: str = "OPENAI_API_KEY"
  file: str = ""
  template: str = TEMPLATE

  def __post_init__(self):
    if self.kind == "server" and urlsplit(self.url).scheme not in ("http", "https"):
      raise ConfigError(f'url is "{self.url}": write http://HOST:PORT/v1.')
    if self.kind == "server" and not self.model:
      raise ConfigError("model is empty: name the model as the server does (GET /v1/models).")
    if self.kind == "batch" and not self.file:
      raise ConfigError("file is empty: a batch captioner reads the lines of a file.")
    if self.frames < 1 or self.side < 32 or self.max_tokens < 1 or self.timeout <= 0:
      raise ConfigError(
        f"frames {self.frames}, side {self.side}, max_tokens {self.max_tokens} and timeout"
        f" {self.timeout} must be at least 1, 32, 1 and above 0."
      )
    _check_template(self.template)

  @property
  def label(self) -> str:
    """How records and reports call it."""
    return self.name or (self.model if self.kind == "server" else self.kind)


class Captioner(Protocol):
  """Writes captions."""

  def caption(self, row: Mapping[str, Any], frames: Sequence[np.ndarray]) -> str:
    """One line for a clip; `frames` uint8 [h, w, 3], none unless it is a server. "": nothing."""


@functools.lru_cache(maxsize=4)
def make(config: CaptionerConfig) -> Captioner:
  """The captioner of a config, kept in this process."""
  kinds = {"server": Server, "batch": Batch, "sidecar": Sidecar, "template": Template}
  return kinds[config.kind](config)


class Server:
  """An OpenAI-compatible chat server (vLLM, SGLang, llama.cpp) that takes pictures."""

  def __init__(self, config: CaptionerConfig):
    self._config = config
    self._url = config.url.rstrip("/") + "/chat/completions"

  def caption(self, row: Mapping[str, Any], frames: Sequence[np.ndarray]) -> str:
    answer = self._ask(self.request(frames))
    try:
      text = answer["choices"][0]["message"]["content"]
      return " ".join(text.split())
    except (KeyError, IndexError, TypeError, AttributeError) as error:
      raise UserError(
        f"{self._url} answered without choices[0].message.content: {json.dumps(answer)[:200]}"
      ) from error

  def request(self, frames: Sequence[np.ndarray]) -> dict[str, Any]:
    """The body of the request: the question, and the frames as JPEG in data URLs."""
    config = self._config
    content: list[dict[str, Any]] = [{"type": "text", "text": config.question}]
    for rgb in frames:
      data = base64.b64encode(jpeg(rgb, config.side)).decode()
      url = f"data:image/jpeg;base64,{data}"
      content.append({"type": "image_url", "image_url": {"url": url}})
    return {
      "model": config.model,
      "messages": [{"role": "user", "content": content}],
      "max_tokens": config.max_tokens,
      "temperature": 0.0,
      "seed": 0,
    }

  def _ask(self, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(self._config.key_variable, "")
    if key:
      headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode()
    reason = ""
    for attempt in range(_RETRIES):
      request = urllib.request.Request(self._url, data, headers)
      try:
        with urllib.request.urlopen(request, timeout=self._config.timeout) as reply:
          return json.load(reply)
      except urllib.error.HTTPError as error:
        reason = f"{error.code} {error.reason}"
        if error.code not in (408, 409, 429) and error.code < 500:
          break  # it would say so again
      except ValueError as error:
        reason = f"no JSON ({error})"
      except OSError as error:  # refused, reset, timed out, unknown host
        reason = str(error)
      if attempt + 1 < _RETRIES:
        time.sleep(2**attempt / 4)
    raise UserError(
      f"the captioner at {self._url} does not answer ({reason}): see captions.first.url and .model;"
      " what is done is kept, run again when it does."
    )


class Batch:
  """Captions that were made elsewhere, by clip_id or by file."""

  def __init__(self, config: CaptionerConfig):
    self._by_clip, self._by_file = {}, {}
    for number, line in enumerate(sidecar.read_text(sidecar.Path(config.file)).splitlines(), 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
        text = " ".join(row["caption"].split())
        if "clip_id" in row:
          self._by_clip[row["clip_id"]] = text
        else:
          self._by_file[row["file"]] = text
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
          f'{config.file}, line {number}: write {{"clip_id": "...", "caption": "..."}}, or "file"'
          " in the place of clip_id."
        ) from error

  def caption(self, row: Mapping[str, Any], frames: Sequence[np.ndarray]) -> str:
    found = self._by_clip.get(row.get("clip_id") or "")
    return found or sidecar.find(self._by_file, row.get("path") or "")


class Sidecar:
  """The source's own text."""

  def __init__(self, config: CaptionerConfig):
    del config

  def caption(self, row: Mapping[str, Any], frames: Sequence[np.ndarray]) -> str:
    return row.get("source_caption") or ""


class Template:
  """A sentence with what is known of the clip."""

  def __init__(self, config: CaptionerConfig):
    self._template = config.template

  def caption(self, row: Mapping[str, Any], frames: Sequence[np.ndarray]) -> str:
    return " ".join(self._template.format(**_facts(row)).split())


def jpeg(rgb: np.ndarray, side: int) -> bytes:
  """The JPEG of uint8 [H, W, 3], its longer side at most `side` pixels."""
  scale = min(1.0, side / max(rgb.shape[:2]))
  if scale < 1:
    rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
  _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
  return data.tobytes()


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
  width, height = row.get("width") or 0, row.get("height") or 0
  wide = "landscape" if width > height else "portrait"
  return {
    "orientation": "square" if width == height else wide,
    "seconds": float(row.get("end") or 0) - float(row.get("start") or 0),
    "width": width,
    "height": height,
    "fps": float(row.get("fps") or 0),
    "source_caption": row.get("source_caption") or "",
  }


def _check_template(template: str) -> None:
  """Only plain names: str.format would follow attributes and indices."""
  known = _facts({})
  try:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    unknown = [name for name in names if name not in known]
    if not unknown:
      template.format(**known)
  except (ValueError, KeyError, IndexError) as error:
    raise ConfigError(f'template is "{template}": it is no format ({error}).') from error
  if unknown:
    raise ConfigError(f'template has "{{{unknown[0]}}}": known: {", ".join(known)}.')
