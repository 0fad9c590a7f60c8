"""Run jobs on several computers: Dask carries them to workers, which receive the files that they lack in checked pieces."""
