"""Puts load on a running server over gRPC and measures it from outside."""
