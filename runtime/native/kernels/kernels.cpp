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
// What processor and operating system support. Not every compiler's `__builtin_cpu_supports` works: Zig's finds
// nothing.
struct Features {
    bool avx2 = false, avx512vnni = false, avxvnni = false;

    Features() {
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        auto bit = [](unsigned value, int position) { return (value >> position & 1) != 0; };
        __get_cpuid(1, &eax, &ebx, &ecx, &edx);
        if (!bit(ecx, 27)) return;  // the operating system does not tell which registers it saves
        bool fma = bit(ecx, 12);
        unsigned saved = 0, high = 0;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
        if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
        avx2 = ymm && fma && bit(ebx, 5);
        bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // F, DQ, BW and VL
        avx512vnni = avx2 && zmm && avx512 && bit(ecx, 11);
        if (eax < 1) return;  // no leaf 7.1
        __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
        avxvnni = avx2 && bit(eax, 4);
    }
};
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
    Features has;
    if (has.avx512vnni) add(avx512vnni_kernels());
    if (has.avxvnni) add(avxvnni_kernels());
    if (has.avx2) add(avx2_kernels());
#elif defined(ITUNE_ARM64)
    if (has_dot_products()) add(neondot_kernels());
    add(neon_kernels());
#endif
    add(portable_kernels());
    return list;
}

}  // namespace itune
