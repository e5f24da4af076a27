"""Who runs the units of work: processes here, a Ray cluster, or an Apache Beam runner."""
