"""Measurements of Postroom beside reference peers, made on real processes over real sockets."""
