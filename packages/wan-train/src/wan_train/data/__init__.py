"""Data sets, and the way of a sample into a step: films, buckets, the sampler, the cache."""
