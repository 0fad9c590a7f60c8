"""Measure what a compressed model lost; every number is stored with the protocol that it depends on."""
