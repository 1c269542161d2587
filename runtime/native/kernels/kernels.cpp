// Which kernels this processor can run.
#include "kernels.h"

#if defined(ITUNE_X86)
#include <cpuid.h>
#elif defined(ITUNE_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace itune {
namespace {

#if defined(ITUNE_X86)
// Not every compiler knows AVX-VNNI by name: leaf 7, subleaf 1, EAX bit 4.
bool has_avxvnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}
#elif defined(ITUNE_ARM64)
bool has_dot_products() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#else
    return true;  // Apple's processors
#endif
}
#endif

}  // namespace

KernelList runnable_kernels() {
    KernelList list{};
    auto add = [&](const Kernels& kernels) { list.all[list.count++] = &kernels; };
#if defined(ITUNE_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (wide && __builtin_cpu_supports("avx512vnni")) add(avx512vnni_kernels());
        if (has_avxvnni()) add(avxvnni_kernels());
        add(avx2_kernels());
    }
#elif defined(ITUNE_ARM64)
    if (has_dot_products()) add(neondot_kernels());
    add(neon_kernels());
#endif
    add(portable_kernels());
    return list;
}

}  // namespace itune
