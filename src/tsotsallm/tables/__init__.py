"""Annotate tables with a knowledge graph: cells with entities, columns with types, pairs of columns with properties."""
