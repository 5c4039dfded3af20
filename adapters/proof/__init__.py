"""The proof that a guard holds: probe, conformance checks, tiny random models."""
