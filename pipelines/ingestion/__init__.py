"""Tables of examples become datasets: read, shuffled, split, chunked, normalised, checked."""
