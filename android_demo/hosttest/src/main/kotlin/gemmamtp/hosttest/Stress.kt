package gemmamtp.hosttest

import gemmamtp.core.LoadGraphs
import gemmamtp.core.Stress
import gemmamtp.core.inTemporaryDirectory
import gemmamtp.core.openDecoder
import gemmamtp.demo.ENGINES
import java.io.File

private const val LONGEST = 270 // tokens: the cache grows once

/** The texts of core's StressTest on a bundle. Arguments: the bundle, how many steps, and a seed. */
fun main(arguments: Array<String>) = inTemporaryDirectory { directory ->
    val stress = Stress(arguments[2].toLong(), LONGEST, File(directory, "session")) { watch, device ->
        val load = LoadGraphs { bundle, manifest, threads -> watch(ENGINES.load(bundle, manifest, threads)) }
        openDecoder(File(arguments[0]), load, device = device, threads = 1)
    }
    println(stress.use { it.run(arguments[1].toInt()) })
}
