"""Work on several computers: Dask carries jobs to workers, which get what they lack in checked pieces."""
