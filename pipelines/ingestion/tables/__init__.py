"""Tables: the sources that can be ingested, each read as named columns, one block of rows at a time."""
