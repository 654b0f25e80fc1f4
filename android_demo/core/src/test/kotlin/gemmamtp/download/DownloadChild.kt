package gemmamtp.download

import java.io.File

/** Download in a process of its own, and wait to be killed in the first pause. */
fun main(arguments: Array<String>) {
    val (url, digest, place) = arguments
    var line = ""
    val patience = Patience(pause = {
        println(line)
        Thread.currentThread().join()
    })
    downloadBundle(url, digest, File(place), patience, { done, total -> line = "$done of $total" }) {}
}
