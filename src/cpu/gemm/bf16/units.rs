//! Which instructions multiply bf16 on this machine.

use std::sync::OnceLock;

/// What multiplies bf16 here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// Tiles of AMX (`TDPBF16PS`).
    Amx,
    /// Vectors of AVX-512 (`VDPBF16PS`).
    Avx512,
    /// Operands are rounded and multiplied in f32.
    Portable,
}

impl Units {
    /// The fastest that this machine has and the system lets this process use; asked once.
    pub fn best() -> Self {
        static BEST: OnceLock<Units> = OnceLock::new();
        *BEST.get_or_init(|| {
            if !vectors() {
                Self::Portable
            } else if tiles() {
                Self::Amx
            } else {
                Self::Avx512
            }
        })
    }

    /// As a run tells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "AMX",
            Self::Avx512 => "AVX-512",
            Self::Portable => "f32, as no units for it can be used here",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> bool {
    false
}

/// Whether the processor has AMX with bf16 and Linux grants it: the state of tiles is large, so a process asks for it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles() -> bool {
    use std::arch::{asm, x86_64::__cpuid_count};
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    if __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    if __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) != AMX_BF16 | AMX_TILE {
        return false;
    }
    let mut answer = SYS_ARCH_PRCTL;
    // SAFETY: a system call that reads two numbers; it clobbers rcx and r11 and returns in rax.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn tiles() -> bool {
    false
}
