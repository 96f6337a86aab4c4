"""Chunks of litdata for tests."""


def write_chunks(root, items, chunk_size=4):
    """What litdata.optimize does in its processes, done in this process."""
    from litdata.streaming.cache import Cache

    root.mkdir(parents=True, exist_ok=True)
    cache = Cache(str(root), chunk_size=chunk_size)
    for i, item in enumerate(items):
        cache[i] = item
    cache.done()
    cache.merge()
    return root
