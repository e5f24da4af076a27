"""Shows a clip from memory to a stage that looks at frames."""

import cv2

from data_pipelines.curate import stage


def show(settings, video, fps=10.0, **row):
  """The scores of a clip, its frames given one by one."""
  height, width = video.shape[1:3]
  known = {"start": 0.0, "end": len(video) / fps, "width": width, "height": height, **row}
  observer = settings.observer(known)
  for index, rgb in enumerate(video):

    def read(form, width, rgb=rgb):
      wide = rgb.shape[1]
      scale = min(1.0, (width or wide) / wide)
      small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
      return small if form == "rgb" else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)

    observer.frame(stage.Frame(index, index / fps, index, read))
  scores = observer.scores()
  if stage.UNSEEN in scores:
    scores |= settings.see([scores.pop(stage.UNSEEN)])[0]
  return scores
