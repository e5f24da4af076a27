"""One file for each stage of curation; see `data_pipelines.curate.stage` for what a stage is."""
