//! The kernel that sums the vectors of ranks, against sums in their order on the host.

use half::bf16;

use trencadis::device::Buffer;
use trencadis::kernels::collective::{MOST_RANKS, sum_ranks};

use crate::support::devices::devices;
use crate::support::numbers::random;

/// Vectors of `len` elements whose sum depends on the order in which it is taken.
fn vectors(ranks: usize, len: usize) -> Vec<Vec<f32>> {
    let scale = |rank: usize| 10f32.powi(rank as i32 % 7 - 3);
    (0..ranks).map(|rank| random::<f32>(len, rank as u64).iter().map(|x| x * scale(rank)).collect()).collect()
}

fn sums(vectors: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vectors[0].clone();
    for vector in &vectors[1..] {
        sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x);
    }
    sum
}

#[test]
fn sums_are_those_of_the_host_bit_for_bit() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for ranks in [1, 2, 3, 5, 8, MOST_RANKS] {
            // One block and some, with and without a rest of a vector; then at odd addresses.
            for (len, skip) in [(1, 0), (2053, 0), (4096, 0), (1029, 1), (130, 3)] {
                let parts = vectors(ranks, len + skip);
                let buffers: Vec<Buffer<f32>> = parts.iter().map(|x| device.upload(x).unwrap()).collect();
                let views: Vec<Buffer<f32>> =
                    buffers.iter().map(|x| x.view(4 * skip..4 * (len + skip)).unwrap()).collect();
                let out = device.alloc::<f32>(len).unwrap();
                sum_ranks(&stream, &out, &views.iter().collect::<Vec<_>>()).unwrap();
                stream.synchronize().unwrap();
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let want = sums(&parts);
                assert_eq!(bits(&out.download().unwrap()), bits(&want[skip..]), "{ranks} of {len} + {skip}");
                // In place, whichever part it is.
                sum_ranks(&stream, &views[ranks / 2], &views.iter().collect::<Vec<_>>()).unwrap();
                stream.synchronize().unwrap();
                let got = buffers[ranks / 2].download().unwrap();
                assert_eq!(bits(&got[skip..]), bits(&want[skip..]));
                assert_eq!(bits(&got[..skip]), bits(&parts[ranks / 2][..skip]), "nothing before");
            }
        }
    }
}

#[test]
fn bf16_is_rounded_once() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for (ranks, len, skip) in [(2, 4099, 0), (7, 2048, 0), (3, 70, 5)] {
            let round = |x: &Vec<f32>| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
            let parts: Vec<Vec<bf16>> = vectors(ranks, len + skip).iter().map(round).collect();
            let buffers: Vec<Buffer<bf16>> = parts.iter().map(|x| device.upload(x).unwrap()).collect();
            let views: Vec<Buffer<bf16>> =
                buffers.iter().map(|x| x.view(2 * skip..2 * (len + skip)).unwrap()).collect();
            let out = device.alloc::<bf16>(len).unwrap();
            sum_ranks(&stream, &out, &views.iter().collect::<Vec<_>>()).unwrap();
            stream.synchronize().unwrap();
            let wide: Vec<Vec<f32>> =
                parts.iter().map(|x| x[skip..].iter().map(|x| x.to_f32()).collect()).collect();
            assert_eq!(out.download().unwrap(), round(&sums(&wide)), "{ranks} of {len}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let [a, b] = [4, 5].map(|len| device.zeros::<f32>(len).unwrap());
        let error = sum_ranks(&stream, &a, &[&a, &b]).unwrap_err();
        assert!(error.to_string().contains("part has 5 elements, expected 4"), "{error}");
        for parts in [vec![], vec![&a; MOST_RANKS + 1]] {
            let error = sum_ranks(&stream, &a, &parts).unwrap_err();
            assert!(error.to_string().contains("expected 1 to 64"), "{error}");
        }
        let empty = device.zeros::<f32>(0).unwrap();
        sum_ranks(&stream, &empty, &[&empty, &empty]).unwrap();
    }
}
