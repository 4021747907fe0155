//! The two precisions of the CPU device.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// Keeps [`Real`] to its two types.
trait Sealed {}
impl Sealed for f32 {}
impl Sealed for f64 {}

/// `f32` or `f64`.
#[allow(private_bounds)]
pub trait Real:
    Sealed
    + Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The slice itself where this is `f32`.
    fn single(x: &[Self]) -> Option<&[f32]>;
    /// The same, to be written.
    fn single_mut(x: &mut [Self]) -> Option<&mut [f32]>;
    /// Rounds to this precision.
    fn of(x: f64) -> Self;
    /// Widens.
    fn f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e^x. Branch-free for `f32`, so that loops over it vectorise.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// ln(1 + x); for `f32` branch-free and for 0 ≤ x ≤ 1 alone.
    fn ln_1p(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function. Branch-free for `f32`.
    fn erf(self) -> Self;
    /// Sine and cosine of `self` turns, that is of 2π·`self`. Branch-free for `f32`.
    fn sin_cos_turns(self) -> (Self, Self);
    /// The larger of two; NaN is kept.
    fn max(self, other: Self) -> Self;
    /// `self * b + c`, fused. Outside [`super::simd::vectorised`] this is a call into the C library
    /// on baseline x86-64; so is what builds on it: `exp`, `tanh` and `erf` of `f32`.
    fn mul_add(self, b: Self, c: Self) -> Self;
}

macro_rules! real {
    ($t:ident, $single:expr, $exp:expr, $ln_1p:expr, $tanh:expr, $erf:expr, $turns:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            fn single(x: &[Self]) -> Option<&[f32]> {
                $single(x)
            }
            fn single_mut(x: &mut [Self]) -> Option<&mut [f32]> {
                $single(x)
            }
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn ln_1p(self) -> Self {
                $ln_1p(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }
            #[inline(always)]
            fn erf(self) -> Self {
                $erf(self)
            }
            #[inline(always)]
            fn sin_cos_turns(self) -> (Self, Self) {
                $turns(self)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                if self.is_nan() || self > other { self } else { other }
            }
            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
        }
    };
}
real!(f32, Some, exp_f32, ln_1p_f32, tanh_f32, erf_f32, sin_cos_turns_f32);
real!(f64, |_| None, f64::exp, f64::ln_1p, f64::tanh, libm::erf, |x: f64| (x * std::f64::consts::TAU)
    .sin_cos());

/// `Σ c[i] x^i` by Horner's rule.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut sum = c[N - 1];
    for i in (0..N - 1).rev() {
        sum = sum.mul_add(x, c[i]);
    }
    sum
}

/// e^x = 2^n e^r with |r| ≤ ln 2 / 2; polynomial of Cephes' `expf`. Overflow gives infinity,
/// NaN stays.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-105.0, 89.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    // ln 2 in two parts, of which the first has few bits: n times it is exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p =
        polynomial(r, [5e-1, 1.666_666_5e-1, 4.166_579_6e-2, 8.333_452e-3, 1.398_199_9e-3, 1.987_569_1e-4]);
    let e = p.mul_add(r * r, r) + 1.0;
    // In two factors, because 2^n alone overflows or underflows before the product does.
    let n = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    e * power(half) * power(n.wrapping_sub(half))
}

/// `2 artanh(u)` with `u = x/(2 + x) ≤ 1/3`, by its series.
#[inline(always)]
fn ln_1p_f32(x: f32) -> f32 {
    let u = x / (2.0 + x);
    let c = [1.0, 1.0 / 3.0, 0.2, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0];
    2.0 * u * polynomial(u * u, c)
}

/// `value`, or exactly ±1 beyond ±`limit`: GELU multiplies what is left of 1 − |erf| by x.
#[inline(always)]
fn saturate(x: f32, limit: f32, value: f32) -> f32 {
    if x.abs() > limit { 1f32.copysign(x) } else { value }
}

/// Rational minimax approximation of degree 13/6, as in Eigen's `ptanh_float`. Beyond 8.5 tanh differs
/// from ±1 by less than 9e-8.
#[inline(always)]
fn tanh_f32(x: f32) -> f32 {
    let x2 = x * x;
    let p = polynomial(
        x2,
        [
            4.893_524_6e-3,
            6.372_619_3e-4,
            1.485_722_4e-5,
            5.122_297_1e-8,
            -8.604_672e-11,
            2.000_188e-13,
            -2.760_768_5e-16,
        ],
    );
    let q = polynomial(x2, [4.893_525e-3, 2.268_434_6e-3, 1.185_347_1e-4, 1.198_258_4e-6]);
    saturate(x, 8.5, x * p / q)
}

/// Rational minimax approximation of degree 13/8 on [−4, 4], as in Eigen's `perf_float`. Beyond 3.8
/// erf differs from ±1 by less than 8e-8.
#[inline(always)]
fn erf_f32(x: f32) -> f32 {
    let x2 = x * x;
    let p = polynomial(
        x2,
        [
            -1.609_603_4e-2,
            -2.954_6e-3,
            -7.349_906_3e-4,
            -5.692_506_4e-5,
            -2.101_024e-6,
            2.770_681_4e-8,
            -2.726_142_3e-10,
        ],
    );
    let q = polynomial(x2, [-1.426_474e-2, -7.373_329e-3, -1.682_827e-3, -2.133_740_6e-4, -1.456_607_2e-5]);
    saturate(x, 3.8, x * p / q)
}

/// Sine and cosine of 2πx: whole turns and then half turns are taken off exactly, and Taylor series
/// serve the remaining quarter turn to either side. Absolute error below 3e-7.
#[inline(always)]
fn sin_cos_turns_f32(x: f32) -> (f32, f32) {
    let turn = x - x.round_ties_even();
    let half = (2.0 * turn).round_ties_even();
    let sign = 1.0 - 2.0 * half.abs();
    let z = (turn - 0.5 * half) * std::f32::consts::TAU;
    let z2 = z * z;
    let sine =
        polynomial(z2, [1.0, -1.666_666_7e-1, 8.333_333e-3, -1.984_127e-4, 2.755_731_9e-6, -2.505_210_8e-8]);
    let cosine = polynomial(
        z2,
        [1.0, -0.5, 4.166_666_8e-2, -1.388_888_9e-3, 2.480_158_7e-5, -2.755_732e-7, 2.087_675_7e-9],
    );
    (sign * z * sine, sign * cosine)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 400 001 values over ±`limit`.
    fn sweep(limit: f64) -> impl Iterator<Item = f32> {
        (-200_000..=200_000).map(move |i| (f64::from(i) / 200_000.0 * limit) as f32)
    }

    #[test]
    fn exp_is_accurate_and_saturates() {
        for x in sweep(87.0) {
            let want = f64::from(x).exp();
            assert!((Real::exp(x).f64() - want).abs() <= 2e-7 * want, "exp({x})");
        }
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert_eq!(Real::exp(-1e4f32), 0.0);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(1e4f32), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
        assert!((Real::exp(-100.0f32).f64() - (-100f64).exp()).abs() < 1e-45);
    }

    #[test]
    fn ln_1p_is_accurate_from_0_to_1() {
        for x in sweep(1.0).filter(|&x| x >= 0.0) {
            let want = f64::from(x).ln_1p();
            assert!((Real::ln_1p(x).f64() - want).abs() <= 3e-7 * want, "ln_1p({x})");
        }
    }

    #[test]
    fn tanh_and_erf_are_accurate_and_saturate() {
        for x in sweep(10.0) {
            let wide = f64::from(x);
            assert!((Real::tanh(x).f64() - wide.tanh()).abs() <= 5e-7 * wide.tanh().abs(), "tanh({x})");
            assert!((Real::erf(x).f64() - libm::erf(wide)).abs() <= 4e-7, "erf({x})");
        }
        assert_eq!((Real::tanh(f32::INFINITY), Real::tanh(-1e30f32)), (1.0, -1.0));
        assert_eq!((Real::erf(f32::NEG_INFINITY), Real::erf(1e30f32)), (-1.0, 1.0));
        assert!(Real::tanh(f32::NAN).is_nan() && Real::erf(f32::NAN).is_nan());
    }

    #[test]
    fn sin_cos_of_turns_are_accurate() {
        for x in sweep(70.0) {
            let (sine, cosine) = x.sin_cos_turns();
            let (want_sine, want_cosine) = f64::from(x).sin_cos_turns();
            assert!((sine.f64() - want_sine).abs() <= 3e-7, "sin({x})");
            assert!((cosine.f64() - want_cosine).abs() <= 3e-7, "cos({x})");
        }
        assert_eq!(3.0f32.sin_cos_turns(), (0.0, 1.0));
        assert_eq!(2.5f32.sin_cos_turns(), (0.0, -1.0));
        assert!(f32::NAN.sin_cos_turns().0.is_nan());
    }

    #[test]
    fn max_keeps_nan() {
        assert_eq!(Real::max(1.0f32, 2.0), 2.0);
        assert!(Real::max(f32::NAN, 2.0).is_nan() && Real::max(2.0, f64::NAN).is_nan());
    }
}
