"""Results, fits, studies and comparisons as one HTML page that works offline, with its pictures as files."""
