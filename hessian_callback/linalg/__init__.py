"""Vectors cut over ranks: the operator protocol, ranks, long sums, random vectors and full float32."""
