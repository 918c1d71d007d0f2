// What torch's C++ side needs so that a CPU build accepts tensors on "cuda:0": a guard for one device with one stream,
// hooks that answer whether CUDA is there, and the choice of an attention kernel.
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {
using namespace c10;

bool present = false;

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return present; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return present; }
  bool isBuilt() const override { return present; }
  bool isAvailable() const override { return present; }
  bool hasPrimaryContext(DeviceIndex) const override { return present; }
  DeviceIndex deviceCount() const override { return present; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool key_heads_are_fewer) {
  return static_cast<int64_t>(key_heads_are_fewer ? at::SDPBackend::math : at::SDPBackend::efficient_attention);
}
} // namespace

extern "C" void set_present(bool on) {
  static const bool placed = [] { // torch made its own hooks when it was imported; these take their place in memory
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(choose_attention);
    return true;
  }();
  (void)placed;
  present = on;
}
