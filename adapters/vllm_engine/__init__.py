"""A guarded model's folder inside vLLM: guarded, or not started.

    picture ─► process 0: processor ─► tower ─► guard ─► codes, and what is to be done about it
                                                          │ codes      │ a mark in the placeholders
    request ─► process 0: admission reads the marks ──────┼─► the answer that is forced
                                                          ▼
               workers: codes ─► codewords ─► language model ─► logits ─► forced tokens

Pixels are looked at once, where requests come in; workers hold codebooks and have no tower.
"""
