"""A look inside a model: attention and its spectra, importance of layers, outliers."""
