//! The norm of gradients of which some come with their squares.

use trencadis::cpu::optim as oracle;
use trencadis::kernels::optim::{Operands, OptimizerState, OptimizerStep, Squared};

use crate::kernels::{OnDevice, RULES, Rule, STEP, scatter};
use crate::support::devices::devices;

/// Where the squares of some tensors are known, their gradients are not read for the norm, by any rule.
#[test]
fn squares_that_are_known_are_not_taken_again() {
    for device in devices() {
        for rule in RULES {
            let on_device = OnDevice::new(&device, STEP);
            let (arena, stream) = (&on_device.arena, device.stream().unwrap());
            let grads = scatter(arena, 5, 1.0);
            on_device.grads.write(&stream, &grads).unwrap();
            let known: Vec<usize> = (0..arena.ranges().len()).step_by(2).collect();
            let sums: Vec<f64> = (0..5000).map(|i| f64::from(i % 7)).collect();
            let squared = Squared::new(&device, arena, &known, device.upload(&sums).unwrap()).unwrap();
            let rest = (0..arena.ranges().len()).filter(|tensor| !known.contains(tensor));
            let rest: f64 =
                rest.map(|tensor| oracle::sum_of_squares(&grads[arena.ranges()[tensor].clone()])).sum();
            let operands = Operands {
                arena,
                tables: &on_device.tables,
                params: &on_device.params,
                grads: &on_device.grads,
                squared: Some(&squared),
                moments: on_device.moments(rule),
                weights: None,
                average: None,
                step: &on_device.step,
                state: &on_device.state,
                stochastic: false,
                workspace: &on_device.workspace,
            };
            let queue = || match rule {
                Rule::AdamW => operands.adamw(&stream).unwrap(),
                Rule::Lamb => operands.lamb(&stream).unwrap(),
                Rule::Sgd { .. } => operands.sgd(&stream).unwrap(),
            };
            queue();
            let (norm, want) =
                (on_device.state.download().unwrap()[0].norm, (sums.iter().sum::<f64>() + rest).sqrt());
            assert!((norm - want).abs() <= 1e-12 * want, "{rule:?}: {norm} instead of {want}");
            let elements: usize = arena.chunks().iter().map(|chunk| chunk.length as usize).sum();
            assert!(squared.bytes() < 4 * elements + 8 * sums.len() && squared.bytes() > 8 * sums.len());
            // A step that is not finished takes no norm.
            on_device.step.write(&stream, &[OptimizerStep { unfinished: 1, ..STEP }]).unwrap();
            on_device.state.write(&stream, &[OptimizerState::default()]).unwrap();
            queue();
            assert_eq!(on_device.state.download().unwrap()[0].norm, 0.0);
        }
    }
}
