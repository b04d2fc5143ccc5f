"""Measurements of Postroom beside reference peers; everything here starts real processes and talks to them over sockets."""
