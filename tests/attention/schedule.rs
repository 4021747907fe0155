//! The work lists that the device makes, against a plain sort.

use half::bf16;

use trencadis::device::{Device, Stream};
use trencadis::kernels::attention::{Limits, Schedule};
use trencadis::recipe::QkNormKind;
use trencadis::rng::{Purpose, Stream as Random};

use crate::case::{Case, Run, config, starts};
use crate::support::devices::devices;

const LIMITS: Limits = Limits { short: 96, half: 64, quarter: 32, tile_rows: 64 };

/// The words of a schedule as they must be.
fn expected(limits: Limits, lengths: &[usize]) -> Vec<i32> {
    let mut images: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
    images.sort_by_key(|&i| std::cmp::Reverse(lengths[i].div_ceil(16).min(1023)));
    let (long, short): (Vec<usize>, Vec<usize>) = images.iter().partition(|&&i| lengths[i] > limits.short);
    let count = |low: usize, high: usize| {
        short.iter().filter(|&&i| lengths[i] > low && lengths[i] <= high).count() as i32
    };
    let long: Vec<i32> = long
        .iter()
        .flat_map(|&i| {
            (0..lengths[i].div_ceil(limits.tile_rows)).flat_map(move |tile| [i as i32, tile as i32])
        })
        .collect();
    let mut words = vec![
        lengths.iter().sum::<usize>() as i32,
        count(limits.half, limits.short),
        count(limits.quarter, limits.half),
        count(0, limits.quarter),
        long.len() as i32 / 2,
        0,
        0,
        0,
    ];
    words.extend(short.iter().map(|&i| i as i32));
    // Nobody reads what follows the short images.
    words.resize(8 + lengths.len(), -1);
    words.extend(long);
    words
}

fn made(device: &Device, stream: &Stream, limits: Limits, lengths: &[usize]) -> Vec<i32> {
    let cu_seqlens = device.upload(&starts(lengths)).unwrap();
    let tokens = lengths.iter().sum();
    let words = device.upload(&vec![-1; limits.words(tokens, lengths.len())]).unwrap();
    let error = device.zeros(1).unwrap();
    let params = limits.params(cu_seqlens.ptr(), words.ptr(), error.ptr(), lengths.len(), tokens, tokens);
    // SAFETY: all buffers have the sizes that the limits ask for.
    unsafe { trencadis::kernels::attention::raw::schedule(device.kernels(), stream.raw(), &params).unwrap() };
    assert_eq!(error.download().unwrap(), [0]);
    words.download().unwrap()
}

#[test]
fn lists_are_sorted_and_complete() {
    let mut random = Random::new(5, 0, 0, Purpose::Init);
    let mut drawn = |n: usize, most: f32| -> Vec<usize> {
        (0..n).map(|_| (random.uniform() * random.uniform() * most) as usize).collect()
    };
    let batches = [
        vec![],
        vec![0; 3],
        vec![1],
        vec![96, 97, 64, 65, 32, 33, 16, 17, 0, 1],
        vec![20_000, 3, 16_400, 30_000, 16_368, 16_000],
        drawn(1000, 300.0),
        drawn(65_536, 20.0),
    ];
    for device in devices() {
        let stream = device.stream().unwrap();
        for lengths in &batches {
            let (got, want) = (made(&device, &stream, LIMITS, lengths), expected(LIMITS, lengths));
            assert!(got.len() >= want.len());
            let mut short: Vec<i32> = got[..want.len()].to_vec();
            let end = 8 + want[1..4].iter().sum::<i32>() as usize;
            short[end..8 + lengths.len()].fill(-1);
            assert!(short == want, "lists of {} images", lengths.len());
        }
    }
}

/// What the host can see is refused before the launch; what only the device sees is told when waited for,
/// and the batch is taken as empty.
#[test]
fn bad_cu_seqlens_are_told() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let cases = [
            ([1, 4, 8], "does not begin at 0", "begins at 1"),
            ([0, 5, 4], "decreases", "decreases from 5 to 4 at image 1"),
            ([0, -3, 4], "decreases", "decreases from 0 to -3 at image 0"),
            ([0, 4, 9], "ends beyond", "ends at 9"),
            ([0, 1, 8], "longer image", "image 1 of cu_seqlens has 7 rows"),
        ];
        for (host, on_device, on_host) in cases {
            let schedule = Schedule::new(&device, LIMITS, 8, 2).unwrap().with_longest(6);
            let cu_seqlens = device.upload(&host).unwrap();
            let refused = schedule.launch(&stream, &cu_seqlens, Some(&host)).unwrap_err();
            assert!(refused.to_string().contains(on_host), "{refused}");
            schedule.check().unwrap();
            schedule.launch(&stream, &cu_seqlens, None).unwrap();
            let told = schedule.check().unwrap_err();
            assert!(told.to_string().contains(on_device), "{told}");
            assert_eq!(told.exit_code(), 2);
            // Whoever only waits is told as well, as long as the lists are there.
            assert_eq!(stream.synchronize().unwrap_err().to_string(), told.to_string());
            drop(schedule);
            stream.synchronize().unwrap();
        }
    }
}

#[test]
fn a_refused_batch_is_empty() {
    for device in devices() {
        let mut case = Case::new(config(QkNormKind::Rms, 2, 64), &[20, 12], 0);
        case.cu_seqlens = vec![0, 40, 32];
        let answer = case.run_unchecked(&device, Run { statistics: true, ..Run::default() });
        assert!(answer.out.iter().all(|&x| x == bf16::ZERO));
        assert!(answer.lse.iter().chain(answer.statistics.iter().flatten()).all(|&x| x == 0.0));
    }
}
