"""Ingestion: tables of examples become datasets, shuffled, split, chunked, normalised and checked."""
