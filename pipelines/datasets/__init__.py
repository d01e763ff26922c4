"""Public datasets, prepared from local files, packages or downloads."""
