// The table of one instruction set's kernels; the declarations follow from the table's own types.
#include "ftso.h"
#include "simd.h"

namespace ftso {

template <typename Pointer>
struct Pointee;
template <typename Result, typename... Arguments>
struct Pointee<Result (*)(Arguments...)> {
  using type = Result(Arguments...);
};
#define FTSO_KERNEL(name) Pointee<decltype(Kernels::name)>::type name

namespace FTSO_OTHERS {  // whose text they are: this instruction set's, as a rule

FTSO_KERNEL(skip_cell_fwd);
FTSO_KERNEL(skip_cell_bwd);
FTSO_KERNEL(block_fwd);
FTSO_KERNEL(block_bwd);
FTSO_KERNEL(block_infer);
FTSO_KERNEL(chain_infer);
FTSO_KERNEL(pools_fwd);
FTSO_KERNEL(pools_bwd);
FTSO_KERNEL(mix_fwd);
FTSO_KERNEL(mix_bwd);

}  // namespace FTSO_OTHERS
namespace FTSO_ISA {

FTSO_KERNEL(split);
FTSO_KERNEL(stem_covariance);
FTSO_KERNEL(stem_fwd);
FTSO_KERNEL(stem_bwd);
FTSO_KERNEL(cell_fwd);
FTSO_KERNEL(cell_bwd);
FTSO_KERNEL(reduce_paths_fwd);
FTSO_KERNEL(reduce_paths_bwd);
FTSO_KERNEL(reduce_fwd);
FTSO_KERNEL(reduce_bwd);
FTSO_KERNEL(fma_peak);

extern const Kernels kernels;
const Kernels kernels = {compiled_isa,
                         kTiles ? split : nullptr,
                         FTSO_OTHERS::skip_cell_fwd,
                         FTSO_OTHERS::skip_cell_bwd,
                         stem_covariance,
                         stem_fwd,
                         stem_bwd,
                         cell_fwd,
                         cell_bwd,
                         reduce_paths_fwd,
                         reduce_paths_bwd,
                         reduce_fwd,
                         reduce_bwd,
                         FTSO_OTHERS::block_fwd,
                         FTSO_OTHERS::block_bwd,
                         FTSO_OTHERS::block_infer,
                         FTSO_OTHERS::chain_infer,
                         FTSO_OTHERS::pools_fwd,
                         FTSO_OTHERS::pools_bwd,
                         FTSO_OTHERS::mix_fwd,
                         FTSO_OTHERS::mix_bwd,
                         fma_peak};

}  // namespace FTSO_ISA
}  // namespace ftso
