// The launchers of csrc/cuda and what they need, in one file: tensor headers are read once.
#include "../../csrc/checks.cpp"
#include "../../csrc/cuda/batch_norm_backward_cuda.cpp"
#include "../../csrc/cuda/batch_norm_cuda.cpp"
#include "../../csrc/cuda/batch_norm_fold_cuda.cpp"
#include "../../csrc/dense_format.cpp"
#include "../../csrc/tensors.cpp"
#include "device_simt.cpp"
#include "ops_simt.cpp"
