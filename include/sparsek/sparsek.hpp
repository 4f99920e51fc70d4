// Everything: score -> select -> attend -> attend_backward -> decode.
#pragma once
#include "sparsek/attend.hpp"
#include "sparsek/attend_backward.hpp"
#include "sparsek/capability.hpp"
#include "sparsek/context.hpp"
#include "sparsek/decode.hpp"
#include "sparsek/error.hpp"
#include "sparsek/projection.hpp"
#include "sparsek/score.hpp"
#include "sparsek/select.hpp"
#include "sparsek/tensor.hpp"
