// Every kernel of the crate, one module.
#include "rows.cu"
#include "tiles.cu"
#include "head.cu"
#include "few.cu"
#include "lora.cu"
#include "sample.cu"
