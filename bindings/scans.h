// The recurrent ops' part of anima_fast._C.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "../csrc/cpu/isa.h"

anima::Isa isa_from(const std::string& name);  // "" is this machine's best; throws for one it does not run

void bind_scans(pybind11::module_& m);
