// Every kernel of the crate, one module.
#include "rows.cu"
#include "tiles.cu"
#include "head.cu"
#include "lora.cu"
#include "sample.cu"
