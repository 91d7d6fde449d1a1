def parse_size(t):
    return tuple(int(x) for x in t.split("x"))
