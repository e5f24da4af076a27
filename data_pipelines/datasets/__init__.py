"""The public data sets of Latte, prepared from the folder that a user has downloaded.

  python -m data_pipelines.datasets --name=ucf101 --source=DIR --out=data/ucf101

  layouts    what each folder must look like, and what is in it
  windows    which frames of a clip are taken, how they are cropped and flipped
  builders   TensorFlow Datasets builders (extra "data"), one for each data set
  clips      any set of captioned clips as a TFDS data set, and back
  folder     the same clips as mp4 files with captions.jsonl, which an experiment trains on

Nothing here downloads anything: each data set has its own terms.
"""
