"""Where anima_fast plugs into other software. Each module is imported by name; none is imported by `anima_fast`."""
