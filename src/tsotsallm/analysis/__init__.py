"""Analysis of a model's inside: attention and its spectra, importance of layers, outliers."""
