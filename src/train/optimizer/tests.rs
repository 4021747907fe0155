use super::*;
use crate::autograd::graph::Init;

fn spec(name: &str, len: usize, decay: bool, head: bool) -> ParamSpec {
    ParamSpec { name: name.into(), shape: vec![len], init: Init::Constant(0.0), decay, head }
}

fn params() -> [ParamSpec; 4] {
    [
        spec("w", 3, true, false),
        spec("gain", 2, false, false),
        spec("head.weight", 2, true, true),
        spec("head.bias", 1, false, true),
    ]
}

/// The first step of AdamW is `lr · g / |g|` plus decay.
fn config() -> TrainConfig {
    TrainConfig { weight_decay: 0.1, clip: 0.0, ..TrainConfig::default() }
}

#[test]
fn decay_groups() {
    assert_eq!(Optimizer::new(&params(), &config()).decay(), [0.1, 0.0, 0.1, 0.0]);
    let own = TrainConfig { head_weight_decay: 3.0, ..config() };
    assert_eq!(Optimizer::new(&params(), &own).decay(), [0.1, 0.0, 3.0, 0.0]);
    let none = TrainConfig { head_weight_decay: 0.0, ..config() };
    assert_eq!(Optimizer::new(&params(), &none).decay(), [0.1, 0.0, 0.0, 0.0]);
}

#[test]
fn a_step_moves_by_the_sign_and_decays() {
    let mut optimizer = Optimizer::new(&params(), &config());
    let mut p = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0; 2], vec![1.0]];
    let grads = vec![vec![2.0, -2.0, 1.0], vec![4.0, -4.0], vec![2.0, 2.0], vec![0.5]];
    let norm = optimizer.step(0.01, &mut p, &grads).unwrap();
    assert!((norm - (4.0 + 4.0 + 1.0 + 32.0 + 8.0 + 0.25f64).sqrt()).abs() < 1e-6, "{norm}");
    let expected = [vec![0.989, 1.009, 0.989], vec![0.99, 1.01], vec![0.989, 0.989], vec![0.99f32]];
    for (got, want) in p.iter().flatten().zip(expected.iter().flatten()) {
        assert!((got - want).abs() < 1e-6, "{p:?}");
    }
    assert_eq!(optimizer.step, 1);
}

#[test]
fn clipping_scales_every_gradient_alike() {
    let clipped = TrainConfig { clip: 0.5, ..config() };
    let mut optimizer = Optimizer::new(&params(), &clipped);
    let mut p = vec![vec![0.0; 3], vec![0.0; 2], vec![0.0; 2], vec![0.0]];
    let grads = vec![vec![3.0, 0.0, 0.0], vec![0.0, 4.0], vec![0.0; 2], vec![0.0]];
    // The first step does not show the scale, the moments do.
    assert!((optimizer.step(0.01, &mut p, &grads).unwrap() - 5.0).abs() < 1e-9);
    assert!(
        (optimizer.first(0)[0] - 0.1 * 0.3).abs() < 1e-7 && (optimizer.first(1)[1] - 0.1 * 0.4).abs() < 1e-7
    );
    // A norm below the bound is left alone.
    let mut other = Optimizer::new(&params(), &TrainConfig { clip: 10.0, ..config() });
    other.step(0.01, &mut p, &grads).unwrap();
    assert!((other.first(0)[0] - 0.3).abs() < 1e-6);
}

/// Whole parameters, and the halves of each with what they tell each other: those that decay move by `lr` times
/// their norm, and by AdamW's step the others.
#[test]
fn lamb_takes_the_norms_of_whole_parameters() {
    let lamb = TrainConfig { optimizer: OptimizerKind::Lamb, ..config() };
    let start = vec![vec![3.0, 0.0, 4.0], vec![1.0; 2], vec![0.6, 0.8], vec![1.0f32]];
    let grads = vec![vec![2.0, -2.0, 1.0], vec![4.0, -4.0], vec![2.0, 2.0], vec![0.5f32]];
    let (mut optimizer, mut whole) = (Optimizer::new(&params(), &lamb), start.clone());
    optimizer.step(0.01, &mut whole, &grads).unwrap();
    let moved = |p: usize| -> f64 {
        let change = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        whole[p].iter().zip(&start[p]).map(change).sum::<f64>().sqrt()
    };
    for (p, want) in [0.05, 0.01 * 2f64.sqrt(), 0.01, 0.01].into_iter().enumerate() {
        assert!((moved(p) - want).abs() < 1e-6, "{p}: {}", moved(p));
    }

    in_halves(&params(), &lamb, 1, (&start, &grads), &whole);
}

/// Steps over the halves of each parameter, which tell each other their sums, do what steps over all did.
fn in_halves(
    specs: &[ParamSpec],
    config: &TrainConfig,
    steps: usize,
    (start, grads): (&[Vec<f32>], &[Vec<f32>]),
    whole: &[Vec<f32>],
) {
    let half_of = |len: usize, half: usize| [0..len / 2, len / 2..len][half].clone();
    let cut = |values: &[Vec<f32>], half: usize| -> Vec<Vec<f32>> {
        values.iter().map(|x| x[half_of(x.len(), half)].to_vec()).collect()
    };
    let norm = squares(grads).iter().sum::<f64>().sqrt();
    let mut halves = [0, 1].map(|half| {
        let slice = |(param, spec): (usize, &ParamSpec)| OwnSlice {
            param,
            runs: std::iter::once(half_of(spec.len(), half)).collect(),
            counted: true,
        };
        let slices = specs.iter().enumerate().map(slice).collect();
        (Optimizer::sliced(specs, slices, config), cut(start, half), cut(grads, half))
    });
    for _ in 0..steps {
        let mut told: Vec<Vec<f64>> = Vec::new();
        for (optimizer, own, grads) in halves.clone().iter_mut() {
            let tell = |sums: Sums<'_>| match sums {
                Sums::Squares(squares) => Err(squares.to_vec()),
                Sums::Statistics(sums) => Err(sums.iter().map(|&x| f64::from(x)).collect()),
            };
            told.push(optimizer.step_of_slices(0.01, norm, own, grads, tell).unwrap_err());
        }
        for (optimizer, own, grads) in &mut halves {
            let both = || told[0].iter().zip(&told[1]).map(|(a, b)| a + b);
            let sum = |sums: Sums<'_>| {
                match sums {
                    Sums::Squares(own) => own.iter_mut().zip(both()).for_each(|(own, sum)| *own = sum),
                    Sums::Statistics(own) => {
                        own.iter_mut().zip(both()).for_each(|(own, sum)| *own = sum as f32);
                    }
                }
                Ok::<_, NonFinite>(())
            };
            optimizer.step_of_slices(0.01, norm, own, grads, sum).unwrap();
        }
    }
    for (half, (_, own, _)) in halves.iter().enumerate() {
        for (got, want) in own.iter().flatten().zip(cut(whole, half).iter().flatten()) {
            assert!((got - want).abs() < 1e-6, "{got} and {want}");
        }
    }
}

/// Matrices of 33 rows and columns, which are factored and cut within a row, and all that is not factored.
#[test]
fn adafactor_takes_the_rows_and_columns_of_whole_parameters() {
    let config = TrainConfig { optimizer: OptimizerKind::Adafactor, ..config() };
    let square = ParamSpec { shape: vec![33, 33], ..spec("square", 0, true, false) };
    let specs = [&params()[..], &[square]].concat();
    let values = |scale: f32| -> Vec<Vec<f32>> {
        let value = |p: usize, i: usize| scale * ((p * 7 + i * 13) % 11) as f32 - scale * 4.5;
        specs.iter().enumerate().map(|(p, spec)| (0..spec.len()).map(|i| value(p, i)).collect()).collect()
    };
    let (start, grads) = (values(0.1), values(0.01));
    let (mut optimizer, mut whole) = (Optimizer::new(&specs, &config), start.clone());
    for _ in 0..3 {
        optimizer.step(0.01, &mut whole, &grads).unwrap();
    }
    assert_eq!(optimizer.statistics().iter().map(Vec::len).collect::<Vec<_>>(), [3, 2, 2, 1, 66]);
    assert!(whole.iter().flatten().zip(start.iter().flatten()).any(|(a, b)| (a - b).abs() > 1e-3));
    in_halves(&specs, &config, 3, (&start, &grads), &whole);
}

#[test]
fn momentum_adds_up_and_decay_stands_beside_it() {
    for (nesterov, want) in [(false, 1.0 - 0.01 * 2.0), (true, 1.0 - 0.01 * (2.0 + 1.8))] {
        let config = TrainConfig { optimizer: OptimizerKind::Sgd, nesterov, ..config() };
        let mut optimizer = Optimizer::new(&params()[1..2], &config);
        let mut p = vec![vec![1.0f32; 2]];
        optimizer.step(0.01, &mut p, &[vec![2.0; 2]]).unwrap();
        assert!((p[0][0] - want).abs() < 1e-6, "{p:?}");
        assert_eq!(
            (optimizer.first(0)[0], optimizer.second(0), optimizer.statistics()),
            (2.0, &[][..], &[][..])
        );
        // Without a gradient the momentum goes on, and what decays shrinks by lr · decay alone.
        let mut optimizer = Optimizer::new(&params()[..1], &config);
        let mut p = vec![vec![1.0f32; 3]];
        optimizer.step(0.5, &mut p, &[vec![0.0; 3]]).unwrap();
        assert!((p[0][0] - 0.95).abs() < 1e-6 && optimizer.first(0)[0] == 0.0, "{p:?}");
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    for (bad, kind) in [
        (f32::NAN, OptimizerKind::AdamW),
        (f32::INFINITY, OptimizerKind::Lamb),
        (f32::NAN, OptimizerKind::Sgd),
        (f32::NEG_INFINITY, OptimizerKind::Adafactor),
    ] {
        let mut optimizer = Optimizer::new(&params(), &TrainConfig { optimizer: kind, ..config() });
        let mut p = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0; 2], vec![1.0]];
        let before = (optimizer.clone(), p.clone());
        let grads = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0, bad], vec![1.0]];
        let error = optimizer.step(0.01, &mut p, &grads).unwrap_err();
        assert!(!error.norm.is_finite());
        assert_eq!((optimizer, p), before);
    }
}
