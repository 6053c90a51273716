"""Benchmarks, imported as `hf_paged.benchmarks`: kernels/, engine/. Every result is a row of one CSV schema."""
