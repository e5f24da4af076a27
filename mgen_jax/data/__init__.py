"""Media in: reading and writing, Marbles, the index, buckets, records and the input pipeline."""
