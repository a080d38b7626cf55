// Compares what our kernels and the host twins assume about instructions' layouts with what CuTe says about them.
// Prints each difference.
#include <cstddef>
#include <cstdint>
#include <cstdio>

// Descriptors hold shared-memory addresses, for which any number will do here.
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<uintptr_t>(p); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cutlass/bfloat16.h>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "../cpu/cuda_host/instruction_layouts.h"
#include "orthrus/wgmma_descriptor.h"

using namespace cute;
using orthrus::cuda::sm90::descriptor_offset;
using orthrus::cuda::sm90::matrix_descriptor_at;
using Bf16 = cutlass::bfloat16_t;

int differences = 0;

void expect(uint64_t ours, uint64_t theirs, const char* what, int i, int j) {
  if (ours != theirs && ++differences <= 20)
    std::printf("%s (%d, %d): %#llx, CuTe has %#llx\n", what, i, j, static_cast<unsigned long long>(ours),
                static_cast<unsigned long long>(theirs));
}

// A [kRows x 64] tile at `address`: descriptors of rows [kFirst, kFirst + kCount) at every step of 16 along K, and
// where each element lies.
template <int kRows, int kFirst, int kCount>
void check_operand(uint32_t address) {
  using Layout = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Bf16>{}, Shape<Int<kRows>, _64>{}));
  const auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Bf16*>(uintptr_t{address})), Layout{});
  const uint64_t begin = matrix_descriptor_at(address) + descriptor_offset(kFirst * 64 * 2);
  for (int step = 0; step < 4; ++step) {
    const auto part = local_tile(tile, Shape<Int<kCount>, _16>{}, make_coord(Int<kFirst / kCount>{}, step));
    const uint64_t ours = begin + descriptor_offset(step * 16 * 2);
    expect(ours, SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(part).desc_, "descriptor", kFirst, step);
    expect(cuda_host::is_swizzled_128(ours), true, "swizzle mode", kFirst, step);
    for (int row = 0; row < kCount; ++row)
      for (int k = 0; k < 16; ++k)
        expect(cuda_host::operand_address(ours, row, k), reinterpret_cast<uintptr_t>(&part(row, k)), "operand", row, k);
  }
}

// The values of 64 keys as the transposed B of dual_attn: halves of 64 columns, each of 64 rows.
template <int kColumns>
void check_transposed(uint32_t address) {
  using Layout = decltype(tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Bf16>{}, Shape<Int<kColumns>, _64>{},
                                        Step<_2, _1>{}));
  const auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Bf16*>(uintptr_t{address})), Layout{});
  for (int step = 0; step < 4; ++step) {
    const auto part = local_tile(tile, Shape<Int<kColumns>, _16>{}, make_coord(_0{}, step));
    const uint64_t ours =
        orthrus::cuda::sm90::transposed_descriptor_at(address, 64 * 128) + descriptor_offset(step * 16 * 128);
    // With 64 columns there are no next ones, so the offset to them does not matter.
    const uint64_t unused = kColumns == 64 ? 0x3fffull << 16 : 0;
    expect(ours & ~unused, SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(part).desc_ & ~unused,
           "transposed descriptor", kColumns, step);
    expect(cuda_host::is_transposed_128(ours), true, "transposed swizzle mode", kColumns, step);
    for (int column = 0; column < kColumns; ++column)
      for (int k = 0; k < 16; ++k)
        expect(cuda_host::transposed_address(ours, column, k), reinterpret_cast<uintptr_t>(&part(column, k)),
               "transposed operand", column, k);
  }
}

template <int kN>
void check_wgmma() {
  using Op = decltype(SM90::GMMA::ss_op_selector<Bf16, Bf16, float, Shape<_64, Int<kN>, _64>>());
  using Traits = MMA_Traits<Op>;
  static_assert(is_same_v<typename Traits::Shape_MNK, Shape<_64, Int<kN>, _16>>);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      const auto [row, column] = cuda_host::wgmma_accumulator(thread, i);
      expect(row + 64 * column, typename Traits::CLayout{}(thread, i), "wgmma accumulator", thread, i);
    }
  }
  // A in registers: for each warp's 16 rows, the layout of mma.
  using OfRegisters = MMA_Traits<decltype(SM90::GMMA::rs_op_selector<Bf16, Bf16, float, Shape<_64, Int<kN>, _64>>())>;
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      const auto [lane, index] = cuda_host::mma_a(row % 16, k);
      expect(row + 64 * k, typename OfRegisters::ALayout{}(row / 16 * 32 + lane, index), "wgmma A", row, k);
    }
  }
}

void check_mma() {
  using Traits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) {
      const auto [lane, index] = cuda_host::mma_a(row, k);
      expect(row + 16 * k, Traits::ALayout{}(lane, index), "mma A", row, k);
    }
    for (int row = 0; row < 8; ++row) {
      const auto [lane, index] = cuda_host::mma_b(row, k);
      expect(row + 8 * k, Traits::BLayout{}(lane, index), "mma B", row, k);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = cuda_host::mma_accumulator(lane, i);
      expect(row + 16 * column, Traits::CLayout{}(lane, i), "mma accumulator", lane, i);
    }
  }
}

// CuTe numbers the bits of the 32 rows that lanes name, 128 bits a row.
template <typename Op>
void check_ldmatrix(cuda_host::Element (*layout)(int, int), const char* what) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const auto [row, column] = layout(lane, i);
      expect(row * 128 + column * 16, typename Copy_Traits<Op>::DstLayout{}(lane, i * 16), what, lane, i);
    }
  }
}

int main() {
  const bool swizzles_alike = detail::get_tma_swizzle_bits(SM90::GMMA::Layout_K_SW128_Atom<Bf16>{}) ==
                              TMA::SmemSwizzleBits::B128;  // the tensor map's
  expect(swizzles_alike, true, "what a tensor copy writes is what wgmma reads", 0, 0);
  check_operand<64, 0, 64>(17 * 1024);  // the weights
  check_operand<16, 0, 16>(1024);
  check_operand<32, 0, 32>(33 * 1024);
  check_operand<64, 0, 64>(226 * 1024);
  check_operand<128, 0, 128>(196 * 1024);
  check_operand<96, 0, 96>(40 * 1024);
  check_operand<112, 0, 112>(48 * 1024);
  check_operand<160, 0, 160>(64 * 1024);
  check_operand<192, 0, 192>(17 * 1024);
  check_operand<256, 0, 256>(64 * 1024);
  check_transposed<64>(9 * 1024);
  check_transposed<128>(80 * 1024);
  check_wgmma<16>();
  check_wgmma<32>();
  check_wgmma<64>();
  check_wgmma<96>();
  check_wgmma<128>();
  check_wgmma<192>();
  check_wgmma<256>();
#ifdef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
  check_wgmma<112>();
  check_wgmma<160>();
#endif
  check_mma();
  check_ldmatrix<SM75_U32x4_LDSM_N>(cuda_host::load_matrix, "ldmatrix");
  check_ldmatrix<SM75_U16x8_LDSM_T>(cuda_host::load_matrix_transposed, "ldmatrix.trans");
  if (differences > 20) std::printf("... %d differences\n", differences);
  return differences != 0;
}
